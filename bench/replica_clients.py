"""Who asks the server that `python -m lragent.bench replicas` measures: processes, since a client that reads every
event in Python takes more time for it than the server."""

from __future__ import annotations

import asyncio
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import httpx

from lragent.bench.clients import Answer, Cost
from lragent.bench.endpoint import TIMEOUT_S, Endpoint
from lragent.bench.playing import Load, Played, play
from lragent.bench.summary import percentile
from lragent.bench.traces import Planned, team, team_trace
from lragent.errors import LRAgentError

MOST_SENT = 5
"""Times that a request is sent whose stream has broken off."""


@dataclass(frozen=True)
class Part:
    """What one client process plays: the paper's trajectory of three roles with `context` tokens for each tool call."""

    context: int
    steps: int
    trajectories: int
    concurrent: int
    vocabulary: int
    seed: int
    persistent: bool
    """Every other request is not streamed, and what breaks off is sent again."""

    def trace(self) -> list[Planned]:
        """The steps of each trajectory."""
        return team_trace(self.context, team(3))[: self.steps]


@dataclass
class Outcome:
    """Of a part. first: seconds to the first token of each request. prompt, cached, generated: tokens of all. ends:
    when answers to a persistent client came, by `time.time`. failures: a sentence each. sent_again: streams that broke
    off.
    """

    began: float
    ended: float
    tokens: int
    first: list[float]
    prompt: int
    cached: int
    generated: int
    ends: list[float]
    failures: list[str]
    sent_again: int


@dataclass
class Persistent:
    """A client that streams every other request only, and sends what has broken off again, as it is told to."""

    url: str
    http: httpx.AsyncClient
    streaming: Endpoint
    ends: list[float] = field(default_factory=list)
    sent_again: int = 0

    def __post_init__(self) -> None:
        self._numbers = itertools.count()

    async def ask(self, role: str, prompt: Sequence[int], answer: int) -> Answer:
        """See Client. Only streams are sent again: an answer in one piece must not fail at all."""
        if next(self._numbers) % 2:
            said = await self._whole(role, prompt, answer)
        else:
            said = await self._streamed(role, prompt, answer)
        self.ends.append(time.time())
        return said

    async def _streamed(self, role: str, prompt: Sequence[int], answer: int) -> Answer:
        for _ in range(MOST_SENT - 1):
            try:
                return await self.streaming.ask(role, prompt, answer)
            except LRAgentError as error:
                if "again" not in str(error):
                    raise
                self.sent_again += 1
        return await self.streaming.ask(role, prompt, answer)

    async def _whole(self, role: str, prompt: Sequence[int], answer: int) -> Answer:
        body = {"model": role, "prompt": list(prompt), "max_tokens": answer, "temperature": 0, "ignore_eos": True}
        began = time.perf_counter()
        try:
            response = await self.http.post(f"{self.url}/completions", json=body | {"return_token_ids": True})
        except httpx.HTTPError as error:
            raise LRAgentError(f"{type(error).__name__}: {error}") from error
        if response.status_code != 200:
            raise LRAgentError(f"HTTP {response.status_code}: {response.text[:300]}")
        said = response.json()
        took, usage = time.perf_counter() - began, said["usage"]
        own = usage["lragent"]
        cost = Cost(usage["prompt_tokens"], own["tokens_computed"], own["base_reused"], own["lr_reused"])
        ids = tuple(said["choices"][0]["token_ids"])
        return Answer(ids, (took,) * len(ids), usage["completion_tokens"], cost)


async def played(url: str, part: Part) -> Outcome:
    """Play `part` to the server at `url`, which ends in /v1."""
    load = Load(part.trajectories, part.concurrent)
    trace, began = part.trace(), time.time()
    async with (
        Endpoint(url, {role: role for role in team(3)}) as endpoint,
        httpx.AsyncClient(timeout=TIMEOUT_S) as http,
    ):
        persistent = Persistent(url, http, endpoint)
        client = persistent if part.persistent else endpoint
        done = await play(client, trace, load, vocabulary=part.vocabulary, seed=part.seed)
    return _outcome(done, began, persistent)


def _outcome(done: Played, began: float, persistent: Persistent) -> Outcome:
    return Outcome(
        began,
        time.time(),
        done.tokens,
        [record.ttft_s for record in done.records],
        sum(record.prompt for record in done.records),
        sum(record.cost.base_reused or 0 for record in done.records),
        sum(record.generated for record in done.records),
        persistent.ends,
        done.failures,
        persistent.sent_again,
    )


async def client(url: str) -> None:
    """Plays each part that is read from stdin."""
    loop = asyncio.get_running_loop()
    print("ready", flush=True)
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        print(json.dumps(vars(await played(url, Part(**json.loads(line))))), flush=True)


class Clients:
    """Some processes that play at the same time."""

    def __init__(self, url: str, count: int) -> None:
        self.count = count
        words = [sys.executable, "-m", "lragent.bench", "replicas", "--client", f"{url}/v1"]
        self._all = [
            subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(count)
        ]
        for each in self._all:
            self._read(each)  # it is ready

    def begin(self, parts: Sequence[Part]) -> None:
        """One part for each process."""
        for each, part in zip(self._all, parts, strict=True):
            print(json.dumps(vars(part)), file=each.stdin, flush=True)

    def ended(self) -> list[Outcome]:
        """Wait for all of them. Raises LRAgentError where one has died."""
        return [Outcome(**json.loads(self._read(each))) for each in self._all]

    def __enter__(self) -> Clients:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for each in self._all:
            each.kill()  # whatever they still wait for is of no use any more
            each.communicate()

    @staticmethod
    def _read(process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise LRAgentError(f"a client ended with status {process.wait()}")
        return line


def split(whole: Part, processes: int) -> list[Part]:
    """`whole` cut into a part for each process, with tokens of its own."""

    def share(number: int, at: int) -> int:
        return number // processes + (at < number % processes)

    return [
        Part(
            **(
                vars(whole)
                | {
                    "trajectories": share(whole.trajectories, at),
                    "concurrent": max(1, share(whole.concurrent, at)),
                    "seed": whole.seed * 1000 + at,
                }
            )
        )
        for at in range(processes)
    ]


def summed(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The outcomes of processes that played at the same time, as figures."""
    seconds = max(each.ended for each in outcomes) - min(each.began for each in outcomes)
    first = [value for each in outcomes for value in each.first]
    prompt = sum(each.prompt for each in outcomes)
    return {
        "seconds": round(seconds, 3),
        "tokens_s": round(sum(each.tokens for each in outcomes) / seconds, 1),
        "requests_s": round(len(first) / seconds, 2),
        "generated_s": round(sum(each.generated for each in outcomes) / seconds, 1),
        "ttft_ms": round(1e3 * percentile(first, 0.5), 2) if first else None,
        "ttft_p95_ms": round(1e3 * percentile(first, 0.95), 2) if first else None,
        "cached_share": round(sum(each.cached for each in outcomes) / max(prompt, 1), 4),
        "failures": [failure for each in outcomes for failure in each.failures],
    }
