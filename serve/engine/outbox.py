"""Pieces of answers on their way from an engine's thread to the event loops that wait for them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace

from lragent.serve.engine.types import Chunk


class Outbox:
    """Gathered by one thread, which hands all over at once, so that each loop is woken once for a step."""

    def __init__(self) -> None:
        self._said: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Queue[Chunk], Chunk]]] = {}

    def put(self, loop: asyncio.AbstractEventLoop, chunks: asyncio.Queue[Chunk], chunk: Chunk) -> None:
        """`chunk` is for `chunks`, which `loop` listens to."""
        self._said.setdefault(loop, []).append((chunks, chunk))

    def deliver(self) -> None:
        """Hand over all that was put."""
        outbox, self._said = self._said, {}
        for loop, said in outbox.items():
            with contextlib.suppress(RuntimeError):  # it has been closed: nobody listens any more
                loop.call_soon_threadsafe(_put_all, said)


def _put_all(said: list[tuple[asyncio.Queue[Chunk], Chunk]]) -> None:
    for chunks, chunk in said:
        chunks.put_nowait(chunk)


async def handed_over(chunks: asyncio.Queue[Chunk], give_up: Callable[[], None]) -> AsyncGenerator[Chunk, None]:
    """What comes, to the last chunk. `give_up` is called where the iteration is left early."""
    ended = False
    try:
        while not ended:
            # Whoever listens more slowly than the engine speaks is told several pieces at once.
            waiting = [await chunks.get()]
            while not chunks.empty():
                waiting.append(chunks.get_nowait())
            chunk = waiting[0] if len(waiting) == 1 else as_one(waiting)
            ended = chunk.finish_reason is not None
            yield chunk
    finally:
        if not ended:
            give_up()


def as_one(chunks: list[Chunk]) -> Chunk:
    """All that they say, as the last one ends."""
    return replace(
        chunks[-1],
        text="".join(chunk.text for chunk in chunks),
        token_ids=tuple(token for chunk in chunks for token in chunk.token_ids),
        logprobs=tuple(logprob for chunk in chunks for logprob in chunk.logprobs),
    )
