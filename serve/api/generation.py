"""From generation requests to answers: gathered whole or as they come, and given up when the client goes."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from starlette.types import Receive

from lragent.errors import UserError
from lragent.serve.api.errors import bad_request
from lragent.serve.api.metering import Call, Meter, budgets_body
from lragent.serve.api.service import Service
from lragent.serve.engine.service import joined
from lragent.serve.engine.types import Chunk, FinishReason, GenerationRequest, Prompt, TokenLogprob, Usage
from lragent.serve.ledger.budgets import Left

T = TypeVar("T")


class ClientGoneError(Exception):
    """The client closed its connection: nobody reads the answer."""


@dataclass(frozen=True)
class Answer:
    """A whole turn. token_ids, logprobs: as a `Chunk`'s."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason
    usage: Usage


def check_room(field: str, prompt: Prompt, max_model_len: int) -> None:
    """Raise ApiError naming `field` unless one token can follow `prompt` in a context of `max_model_len`."""
    if len(prompt.ids) >= max_model_len:
        raise bad_request(
            f"{field}: {len(prompt.ids)} tokens leave no room for an answer in a context of {max_model_len}; "
            "shorten it, or start the server with a larger --max-model-len if the model allows.",
            code="context_length_exceeded",
        )


async def gather_answers(meter: Meter, call: Call, requests: Sequence[GenerationRequest]) -> list[Answer]:
    """Run `requests` beside one another. Where one fails, the others are cancelled and its error is raised."""
    requests = [replace(request, whole=True) for request in requests]
    gathered: list[list[Chunk]] = [[] for _ in requests]
    async with aclosing(interleave(meter, call, requests)) as pieces:
        async for index, chunk in pieces:
            gathered[index].append(chunk)
    return [_answer(joined(chunks)) for chunks in gathered]


def _answer(whole: Chunk) -> Answer:
    assert whole.finish_reason is not None
    assert whole.usage is not None
    return Answer(whole.text, whole.token_ids, whole.logprobs, whole.finish_reason, whole.usage)


async def interleave(
    meter: Meter, call: Call, requests: Sequence[GenerationRequest]
) -> AsyncGenerator[tuple[int, Chunk], None]:
    """Yield (index of the request, chunk) as they come. One failure ends all; closing cancels all."""
    if len(requests) == 1:
        async with aclosing(meter.stream(call, requests[0])) as chunks:
            async for chunk in chunks:
                yield 0, chunk
        return
    queue: asyncio.Queue[tuple[int, Chunk] | None] = asyncio.Queue()

    async def pump(index: int) -> None:
        async with aclosing(meter.stream(call, requests[index])) as chunks:
            async for chunk in chunks:
                queue.put_nowait((index, chunk))

    def ended(task: asyncio.Task[None]) -> None:
        queue.put_nowait(None)

    tasks = [asyncio.create_task(pump(index)) for index in range(len(requests))]
    for task in tasks:
        task.add_done_callback(ended)
    running = len(tasks)
    try:
        while running:
            piece = await queue.get()
            if piece is not None:
                yield piece
                continue
            running -= 1
            for task in tasks:
                if task.done():
                    task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def until_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Run `work` to its end, but cancel it, and raise ClientGoneError, once the client has closed its connection."""
    working = asyncio.create_task(work)
    watching = asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def compile_grammar(service: Service, request: GenerationRequest, field: str) -> None:
    """Compile a request's grammar, if it has one, away from the event loop: huge ones take a tenth of a second.

    Raises UserError naming `field`, which has asked for it.
    """
    if request.params.grammar is None:
        return
    try:
        await asyncio.to_thread(service.check, request)
    except UserError as error:
        raise UserError(re.sub(r"^grammar: ", f"{field}: ", str(error))) from None


def copies(request: GenerationRequest, n: int) -> list[GenerationRequest]:
    """`n` requests for one prompt, each with draws of its own."""
    if n == 1:
        return [request]
    seed = request.params.seed
    return [
        replace(
            request,
            request_id=f"{request.request_id}-{at}",
            params=request.params if seed is None else replace(request.params, seed=_seed(seed, at)),
        )
        for at in range(n)
    ]


def _seed(seed: int, at: int) -> int:
    """In 64 bits, as seeds must be."""
    return (seed + at + 2**63) % 2**64 - 2**63


def usage_body(usages: Sequence[Usage], n: int = 1, left: Sequence[Left] = ()) -> dict[str, Any]:
    """OpenAI's `usage` of the requests together, `n` for each prompt, which counts once. `cached_tokens` are those of
    the prompts that no model ran over; `lragent` counts what all requests cost. left: of the budgets that apply."""
    prompt, completion = sum(u.prompt_tokens for u in usages) // n, sum(u.completion_tokens for u in usages)
    computed = sum(u.tokens_computed for u in usages)
    own: dict[str, Any] = {
        "tokens_computed": computed,
        "base_reused": sum(u.base_reused for u in usages),
        "lr_reused": sum(u.lr_reused for u in usages),
        "lr_prefilled": sum(u.lr_prefilled for u in usages),
    }
    if left:
        own["budgets"] = budgets_body(list(left))
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": max(0, prompt - computed)},
        "lragent": own,
    }
