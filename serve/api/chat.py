"""POST /v1/chat/completions: one turn of one role, whole or streamed."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from lragent.chat import BASE
from lragent.chat_tools import ToolForm
from lragent.serve.api.access import caller_of
from lragent.serve.api.body import read_json
from lragent.serve.api.context import Context
from lragent.serve.api.generation import (
    Answer,
    check_room,
    compile_grammar,
    copies,
    gather_answers,
    interleave,
    until_gone,
    usage_body,
)
from lragent.serve.api.logprobs import chat_logprobs
from lragent.serve.api.metering import Call, budgets_header
from lragent.serve.api.models import resolve_role
from lragent.serve.api.openapi import text_answers
from lragent.serve.api.schema import ChatRequest, parse_request
from lragent.serve.api.sse import DONE, EventStream, event
from lragent.serve.api.tool_calls import CallStream, constrained, parse_calls
from lragent.serve.engine.types import Chunk, GenerationRequest, Usage


def chat_router(context: Context) -> APIRouter:
    """The endpoint, over `context`."""
    router = APIRouter()

    @router.post("/v1/chat/completions", response_model=None, openapi_extra=text_answers(ChatRequest))
    async def create_chat_completion(request: Request) -> Response:
        asked = parse_request(ChatRequest, await read_json(request, context.settings.max_body_bytes))
        chat = await _prepare(context, request, asked)
        headers = budgets_header(context.meter.left(chat.call, chat.role))
        if asked.stream:
            return EventStream(_events(context, chat), headers)
        answers = await until_gone(request.receive, gather_answers(context.meter, chat.call, chat.generations))
        choices = [_choice(context, chat, index, answer) for index, answer in enumerate(answers)]
        left = context.meter.left(chat.call, chat.role)
        usage = usage_body([answer.usage for answer in answers], len(answers), left)
        body = chat.head("chat.completion") | chat.prompt_ids() | {"choices": choices, "usage": usage}
        return JSONResponse(body, headers=budgets_header(left))

    return router


@dataclass(frozen=True)
class _Chat:
    """One request on its way. generations: one for each choice. tools: how calls are written, where any may be."""

    asked: ChatRequest
    call: Call
    generations: list[GenerationRequest]
    tools: ToolForm | None

    @property
    def role(self) -> str:
        return self.generations[0].role

    def head(self, kind: str) -> dict[str, Any]:
        """What every body of the answer begins with."""
        request_id = self.generations[0].request_id
        request_id = request_id.removesuffix("-0") if len(self.generations) > 1 else request_id
        return {"id": request_id, "object": kind, "created": int(time.time()), "model": self.asked.model}

    def prompt_ids(self) -> dict[str, Any]:
        if not self.asked.return_token_ids:
            return {}
        return {"prompt_token_ids": self.generations[0].prompt.ids.tolist()}


async def _prepare(context: Context, request: Request, asked: ChatRequest) -> _Chat:
    """Check everything that can be checked before the engine is asked. Raises UserError."""
    service = context.service
    role = resolve_role(service, asked.model)
    asked.check_length(service.max_model_len)
    n = asked.choices(context.settings.max_n)
    params = asked.sampling(default_max_tokens=service.max_model_len)
    messages, (tools, choice) = asked.given_messages(), asked.offered_tools()
    salt = context.salt(caller_of(request), asked.salt)
    form = service.chat.tool_form() if tools else None
    prompt = await context.tokenize(lambda: service.chat.prepare(messages, role, salt, tools))
    check_room("messages", prompt, service.max_model_len)
    _, limit = asked.requested_tokens()
    if limit is None:
        most = service.max_model_len - len(prompt.ids)
        params = replace(params, max_tokens=most) if params.min_tokens <= most else params
    if form is not None:
        params = constrained(params, form, tools, choice, many=asked.parallel_tool_calls is not False)
    generation = GenerationRequest(f"chatcmpl-{uuid.uuid4().hex}", role, prompt, params, salt)
    await compile_grammar(service, generation, asked.grammar_field())
    call = context.call(request, "chat", asked.trajectory_id, asks_length=limit is not None)
    return _Chat(asked, call, copies(generation, n), form if choice.mode != "none" else None)


def _choice(context: Context, chat: _Chat, index: int, answer: Answer) -> dict[str, Any]:
    message = _message(chat.role) | {"content": answer.text}
    finish_reason = answer.finish_reason.value
    if chat.tools is not None:
        said = parse_calls(context, chat.tools, chat.generations[index], answer)
        message["content"] = said.content
        if said.calls:
            message["tool_calls"], finish_reason = said.calls, "tool_calls"
    choice = {"index": index, "message": message, "finish_reason": finish_reason}
    return choice | _details(context, chat.asked, answer)


async def _events(context: Context, chat: _Chat) -> AsyncGenerator[bytes, None]:
    asked, head = chat.asked, chat.head("chat.completion.chunk")
    if asked.include_usage:
        head["usage"] = None
    streams = [_ChoiceStream(context, chat, index) for index in range(len(chat.generations))]
    usages: list[Usage] = []
    opened: set[int] = set()
    async with aclosing(interleave(context.meter, chat.call, chat.generations)) as pieces:
        async for index, chunk in pieces:
            if index not in opened:
                more = {} if opened else chat.prompt_ids()
                opened.add(index)
                first = {"delta": _message(chat.role) | {"content": ""}, "logprobs": None, "finish_reason": None}
                yield event(head | more | {"choices": [{"index": index} | first]})
            for choice in streams[index].said(chunk):
                yield event(head | {"choices": [choice]})
            if chunk.usage is not None:
                usages.append(chunk.usage)
    if asked.include_usage:
        left = context.meter.left(chat.call, chat.role)
        yield event(head | {"choices": [], "usage": usage_body(usages, len(usages), left)})
    yield DONE


class _ChoiceStream:
    """One choice, chunk by chunk."""

    def __init__(self, context: Context, chat: _Chat, index: int) -> None:
        self._context, self._chat, self._index = context, chat, index
        self._calls = None if chat.tools is None else CallStream(chat.tools)

    def said(self, chunk: Chunk) -> Iterator[dict[str, Any]]:
        """The choices of events that tell of `chunk`."""
        text = chunk.text if self._calls is None else self._calls.push(chunk)
        if text or (chunk.token_ids and self._chat.asked.wants_tokens):
            yield self._choice({"content": text}, **_details(self._context, self._chat.asked, chunk))
        if chunk.finish_reason is None:
            return
        reason = chunk.finish_reason.value
        if self._calls is not None:
            answer = self._calls.whole(chunk)
            said = parse_calls(self._context, self._calls.form, self._chat.generations[self._index], answer)
            rest = (said.content or "")[self._calls.sent :]
            if rest:
                yield self._choice({"content": rest})
            for at, each in enumerate(said.calls):
                yield self._choice({"tool_calls": [{"index": at} | each]})
            reason = "tool_calls" if said.calls else reason
        yield self._choice({}, reason)

    def _choice(self, delta: dict[str, Any], finish_reason: str | None = None, **more: Any) -> dict[str, Any]:
        return {"index": self._index, "delta": delta, "logprobs": None, "finish_reason": finish_reason} | more


def _details(context: Context, asked: ChatRequest, said: Answer | Chunk) -> dict[str, Any]:
    """What a choice says of its tokens."""
    logprobs = chat_logprobs(context.token_text, said.logprobs) if asked.logprobs else None
    ids = {"token_ids": list(said.token_ids)} if asked.return_token_ids else {}
    return {"logprobs": logprobs} | ids


def _message(role: str) -> dict[str, Any]:
    """An assistant's message without its content. `name` is the role, so that it may go back as it is."""
    return {"role": "assistant"} if role == BASE else {"role": "assistant", "name": role}
