"""Trajectories played to a client, one or many at once, each step sent when the answer before it has ended."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lragent.bench.clients import Answer, Client, Cost
from lragent.bench.traces import Planned, random_tokens
from lragent.errors import LRAgentError


@dataclass(frozen=True)
class Record:
    """One request that was answered.

    gaps_s: seconds between each token and the one before it; 0 where several came at once. total_s: to the last token.
    """

    trajectory: int
    step: int
    role: str
    prompt: int
    generated: int
    ttft_s: float
    gaps_s: tuple[float, ...]
    total_s: float
    cost: Cost


@dataclass
class Played:
    """Trajectories as they went. failures: a sentence for each that did not come to its end."""

    records: list[Record] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    wall_s: float = 0.0
    """From the first request to the last token."""
    tokens: int = 0
    """Of all sequences together, prompts and answers."""


@dataclass(frozen=True)
class Load:
    """How many trajectories are played, and when each begins.

    concurrent: at most so many at once. rate: None begins all at once; else trajectories a second, at random moments
    (a Poisson process).
    """

    trajectories: int = 1
    concurrent: int = 1
    rate: float | None = None

    def starts(self, seed: int) -> list[float]:
        """Seconds until each trajectory begins; the first does at once."""
        if self.rate is None:
            return [0.0] * self.trajectories
        source, now, starts = random.Random(seed), 0.0, []
        for _ in range(self.trajectories):
            starts.append(now)
            now += source.expovariate(self.rate)
        return starts


async def play(
    client: Client,
    trace: Sequence[Planned],
    load: Load,
    *,
    vocabulary: int,
    seed: int,
    progress: Callable[[], None] = lambda: None,
) -> Played:
    """Play `trace` as often as `load` says, each time with tokens of its own. `progress` is called for every answer.

    A request that fails ends its trajectory only; nothing is raised for it.
    """
    source = random.Random(seed)
    needed = sum(step.new for step in trace)
    prompts = [random_tokens(needed, vocabulary, source.getrandbits(63)) for _ in range(load.trajectories)]
    played = Played()
    room = asyncio.Semaphore(load.concurrent)
    begun = time.perf_counter()

    async def one(number: int, start: float) -> None:
        await asyncio.sleep(start)
        async with room:
            length = await _trajectory(client, trace, prompts[number], number, played, progress)
            played.tokens += length  # read only now: others have added theirs meanwhile

    await asyncio.gather(*(one(number, start) for number, start in enumerate(load.starts(seed))))
    played.wall_s = time.perf_counter() - begun
    return played


async def _trajectory(
    client: Client,
    trace: Sequence[Planned],
    tokens: Sequence[int],
    number: int,
    played: Played,
    progress: Callable[[], None],
) -> int:
    """Plays one trajectory; returns how long it became."""
    context: list[int] = []
    used = 0
    for at, step in enumerate(trace):
        context += tokens[used : used + step.new]
        used += step.new
        try:
            answer = await client.ask(step.role, context, step.answer)
            if answer.generated != step.answer:
                raise LRAgentError(f"{step.answer} tokens were asked for and {answer.generated} came")
        except LRAgentError as error:
            played.failures.append(f"trajectory {number}, step {at + 1} ({step.role}, {len(context)} tokens): {error}")
            return len(context) - step.new
        played.records.append(_record(number, at, step.role, len(context), answer))
        context += answer.token_ids
        progress()
    return len(context)


def _record(trajectory: int, step: int, role: str, prompt: int, answer: Answer) -> Record:
    times = answer.times
    gaps = tuple(after - before for before, after in itertools.pairwise(times))
    return Record(trajectory, step, role, prompt, answer.generated, times[0], gaps, times[-1], answer.cost)
