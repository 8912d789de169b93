"""POST /v1/completions: texts or token ids continued by one role, whole or streamed."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from lragent.errors import UserError
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
from lragent.serve.api.logprobs import CompletionLogprobs
from lragent.serve.api.metering import Call, budgets_header
from lragent.serve.api.models import resolve_role
from lragent.serve.api.openapi import text_answers
from lragent.serve.api.schema import CompletionRequest, parse_request
from lragent.serve.api.sse import DONE, EventStream, event
from lragent.serve.engine.types import Chunk, GenerationRequest, Prompt, Usage

DEFAULT_MAX_TOKENS = 16
"""OpenAI's."""


def completions_router(context: Context) -> APIRouter:
    """The endpoint, over `context`."""
    router = APIRouter()

    @router.post("/v1/completions", response_model=None, openapi_extra=text_answers(CompletionRequest))
    async def create_completion(request: Request) -> Response:
        asked = parse_request(CompletionRequest, await read_json(request, context.settings.max_body_bytes))
        head: dict[str, Any] = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": asked.model,
        }
        n = asked.choices(context.settings.max_n)
        generations = await _prepare(context, request, asked, head["id"], n)
        limited = asked.max_tokens is not None
        call = context.call(request, "completions", asked.trajectory_id, asks_length=limited)
        role = generations[0].role
        if asked.stream:
            headers = budgets_header(context.meter.left(call, role))
            return EventStream(_events(context, asked, head, call, generations, n), headers)
        answers = await until_gone(request.receive, gather_answers(context.meter, call, generations))
        choices = [
            _Choice(context, asked, index, generations[index]).body(answer) for index, answer in enumerate(answers)
        ]
        left = context.meter.left(call, role)
        usage = usage_body([answer.usage for answer in answers], n, left)
        return JSONResponse(head | {"choices": choices, "usage": usage}, headers=budgets_header(left))

    return router


async def _prepare(
    context: Context, request: Request, asked: CompletionRequest, request_id: str, n: int
) -> list[GenerationRequest]:
    """`n` requests per prompt, in their order. Raises UserError."""
    service = context.service
    role = resolve_role(service, asked.model)
    asked.check_length(service.max_model_len)
    params = asked.sampling(default_max_tokens=DEFAULT_MAX_TOKENS)
    given = asked.prompts(n)
    if asked.echo and asked.logprobs is not None:
        raise UserError("echo: cannot be used together with logprobs, since prompts have none here; leave one out.")
    salt = context.salt(caller_of(request), asked.salt)

    def tokenize() -> list[Prompt]:
        special = asked.add_special_tokens is not False
        return [
            Prompt(
                tuple(
                    service.tokenizer(each, add_special_tokens=special)["input_ids"] if isinstance(each, str) else each
                )
            )
            for each in given
        ]

    prompts = await context.tokenize(tokenize)
    for prompt in prompts:
        check_room("prompt", prompt, service.max_model_len)
    names = [request_id if len(prompts) == 1 else f"{request_id}-{index}" for index in range(len(prompts))]
    requests = [
        GenerationRequest(name, role, prompt, params, salt) for name, prompt in zip(names, prompts, strict=True)
    ]
    await compile_grammar(service, requests[0], asked.grammar_field())
    return [each for one in requests for each in copies(one, n)]


async def _events(
    context: Context,
    asked: CompletionRequest,
    head: dict[str, Any],
    call: Call,
    generations: list[GenerationRequest],
    n: int,
) -> AsyncGenerator[bytes, None]:
    if asked.include_usage:
        head = head | {"usage": None}
    choices = [_Choice(context, asked, index, generation) for index, generation in enumerate(generations)]
    usages: list[Usage] = []
    async with aclosing(interleave(context.meter, call, generations)) as pieces:
        async for index, chunk in pieces:
            if chunk.usage is not None:
                usages.append(chunk.usage)
            if chunk.text or chunk.finish_reason is not None or (chunk.token_ids and asked.wants_tokens):
                yield event(head | {"choices": [choices[index].body(chunk)]})
    if asked.include_usage:
        left = context.meter.left(call, generations[0].role)
        yield event(head | {"choices": [], "usage": usage_body(usages, n, left)})
    yield DONE


class _Choice:
    """One prompt's answer, whole or chunk by chunk."""

    def __init__(self, context: Context, asked: CompletionRequest, index: int, generation: GenerationRequest) -> None:
        self._index = index
        self._logprobs = None if asked.logprobs is None else CompletionLogprobs(context.token_text)
        self._token_ids = bool(asked.return_token_ids)
        self._prompt_ids = generation.prompt.ids.tolist() if self._token_ids else None
        self._echo = context.service.tokenizer.decode(generation.prompt.ids.tolist()) if asked.echo else ""

    def body(self, said: Answer | Chunk) -> dict[str, Any]:
        """What comes next of it, the first time with the prompt's ids where these are asked for."""
        body: dict[str, Any] = {
            "index": self._index,
            "text": self._echo + said.text,
            "logprobs": None if self._logprobs is None else self._logprobs.body(said.logprobs),
            "finish_reason": None if said.finish_reason is None else said.finish_reason.value,
        }
        self._echo = ""
        if self._token_ids:
            body["token_ids"] = list(said.token_ids)
        if self._prompt_ids is not None:
            body["prompt_token_ids"], self._prompt_ids = self._prompt_ids, None
        return body
