"""From generation requests to answers: gathered whole or as they come, and given up when the client goes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.types import Receive

from lragent.serve.api.context import Service
from lragent.serve.api.errors import ApiError, bad_request
from lragent.serve.engine.service import joined
from lragent.serve.engine.types import Chunk, FinishReason, GenerationRequest, Prompt, TokenLogprob, Usage

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


async def stream_chunks(service: Service, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
    """Yield the chunks of one request; the last has its finish reason (stop or length) and usage.

    Closing the generator cancels the request. Raises what `Service.stream` does, and ApiError where the engine gave up.
    """
    async with aclosing(service.stream(request)) as chunks:
        async for chunk in chunks:
            if chunk.finish_reason in (FinishReason.ERROR, FinishReason.CANCELLED):
                raise _failure(service, chunk)
            yield chunk


def _failure(service: Service, chunk: Chunk) -> ApiError:
    if not service.alive:
        return ApiError(503, chunk.error or "The engine has stopped.", code="engine_dead")
    if chunk.finish_reason is FinishReason.CANCELLED:
        return ApiError(503, chunk.error or "The request was cancelled.", code="cancelled")
    return ApiError(500, chunk.error or "The engine failed on this request.", code="engine_error")


async def gather_answers(service: Service, requests: Sequence[GenerationRequest]) -> list[Answer]:
    """Run `requests` beside one another. Where one fails, the others are cancelled and its error is raised."""
    gathered: list[list[Chunk]] = [[] for _ in requests]
    async with aclosing(interleave(service, requests)) as pieces:
        async for index, chunk in pieces:
            gathered[index].append(chunk)
    return [_answer(joined(chunks)) for chunks in gathered]


def _answer(whole: Chunk) -> Answer:
    assert whole.finish_reason is not None
    assert whole.usage is not None
    return Answer(whole.text, whole.token_ids, whole.logprobs, whole.finish_reason, whole.usage)


async def interleave(
    service: Service, requests: Sequence[GenerationRequest]
) -> AsyncGenerator[tuple[int, Chunk], None]:
    """Yield (index of the request, chunk) as they come. One failure ends all; closing cancels all."""
    if len(requests) == 1:
        async with aclosing(stream_chunks(service, requests[0])) as chunks:
            async for chunk in chunks:
                yield 0, chunk
        return
    queue: asyncio.Queue[tuple[int, Chunk] | None] = asyncio.Queue()

    async def pump(index: int) -> None:
        async with aclosing(stream_chunks(service, requests[index])) as chunks:
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


def usage_body(usages: Sequence[Usage]) -> dict[str, Any]:
    """OpenAI's `usage` of the requests together. `cached_tokens` are those of the prompt that no model ran over."""
    prompt, completion = sum(u.prompt_tokens for u in usages), sum(u.completion_tokens for u in usages)
    reused, prefilled = sum(u.base_reused for u in usages), sum(u.lr_prefilled for u in usages)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": reused - prefilled},
        "lragent": {
            "tokens_computed": sum(u.tokens_computed for u in usages),
            "base_reused": reused,
            "lr_reused": sum(u.lr_reused for u in usages),
            "lr_prefilled": prefilled,
        },
    }
