"""POST /v1/chat/completions: one turn of one role, whole or streamed."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from lragent.chat import BASE
from lragent.serve.api.body import read_json
from lragent.serve.api.context import Context
from lragent.serve.api.generation import Answer, check_room, gather_answers, stream_chunks, until_gone, usage_body
from lragent.serve.api.logprobs import chat_logprobs
from lragent.serve.api.models import resolve_role
from lragent.serve.api.schema import ChatRequest, parse_request
from lragent.serve.api.sse import DONE, EventStream, event
from lragent.serve.engine.types import Chunk, GenerationRequest


def chat_router(context: Context) -> APIRouter:
    """The endpoint, over `context`."""
    router = APIRouter()

    @router.post("/v1/chat/completions", response_model=None)
    async def create_chat_completion(request: Request) -> Response:
        asked = parse_request(ChatRequest, await read_json(request, context.max_body_bytes))
        generation = await _prepare(context, asked)
        if asked.stream:
            return EventStream(_events(context, asked, generation))
        (answer,) = await until_gone(request.receive, gather_answers(context.service, [generation]))
        message = _message(generation.role) | {"content": answer.text}
        choice = {"index": 0, "message": message, "finish_reason": answer.finish_reason.value}
        choice |= _details(context, asked, answer)
        head = _head(asked, generation, "chat.completion") | _prompt_ids(asked, generation)
        return JSONResponse(head | {"choices": [choice], "usage": usage_body([answer.usage])})

    return router


async def _prepare(context: Context, asked: ChatRequest) -> GenerationRequest:
    """Check everything that can be checked before the engine is asked. Raises UserError."""
    service = context.service
    role = resolve_role(service, asked.model)
    asked.check_length(service.max_model_len)
    asked.sampling(default_max_tokens=1)
    messages = asked.given_messages()
    prompt = await context.tokenize(lambda: service.chat.prepare(messages, role, asked.salt))
    check_room("messages", prompt, service.max_model_len)
    return GenerationRequest(
        request_id=f"chatcmpl-{uuid.uuid4().hex}",
        role=role,
        prompt=prompt,
        params=asked.sampling(default_max_tokens=service.max_model_len - len(prompt.ids)),
        salt=asked.salt,
    )


async def _events(context: Context, asked: ChatRequest, generation: GenerationRequest) -> AsyncGenerator[bytes, None]:
    head = _head(asked, generation, "chat.completion.chunk")
    if asked.include_usage:
        head["usage"] = None

    def chunk_event(delta: dict[str, Any], finish_reason: str | None = None, **more: Any) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return event(head | {"choices": [choice | more]})

    opened = False
    async with aclosing(stream_chunks(context.service, generation)) as chunks:
        async for chunk in chunks:
            if not opened:
                opened = True
                first = {"delta": _message(generation.role) | {"content": ""}, "logprobs": None, "finish_reason": None}
                yield event(head | _prompt_ids(asked, generation) | {"choices": [{"index": 0} | first]})
            if chunk.text or (chunk.token_ids and asked.wants_tokens):
                yield chunk_event({"content": chunk.text}, **_details(context, asked, chunk))
            if chunk.finish_reason is not None:
                yield chunk_event({}, chunk.finish_reason.value)
                if asked.include_usage and chunk.usage is not None:
                    yield event(head | {"choices": [], "usage": usage_body([chunk.usage])})
    yield DONE


def _details(context: Context, asked: ChatRequest, said: Answer | Chunk) -> dict[str, Any]:
    """What a choice says of its tokens."""
    logprobs = chat_logprobs(context.token_text, said.logprobs) if asked.logprobs else None
    ids = {"token_ids": list(said.token_ids)} if asked.return_token_ids else {}
    return {"logprobs": logprobs} | ids


def _prompt_ids(asked: ChatRequest, generation: GenerationRequest) -> dict[str, Any]:
    return {"prompt_token_ids": generation.prompt.ids.tolist()} if asked.return_token_ids else {}


def _head(asked: ChatRequest, generation: GenerationRequest, kind: str) -> dict[str, Any]:
    return {"id": generation.request_id, "object": kind, "created": int(time.time()), "model": asked.model}


def _message(role: str) -> dict[str, Any]:
    """An assistant's message without its content. `name` is the role, so that it may go back as it is."""
    return {"role": "assistant"} if role == BASE else {"role": "assistant", "name": role}
