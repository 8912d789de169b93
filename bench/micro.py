"""Single figures of one engine: decode at given contexts, a short append, many sequences at once, a long prefill."""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

from lragent.bench.clients import Answer
from lragent.bench.engines import MeasuredEngine
from lragent.bench.roofline import Roofline
from lragent.bench.trace_plan import MicroPlan
from lragent.bench.traces import Work, random_tokens
from lragent.errors import LRAgentError

Figure = dict[str, Any]
"""figure: its name. value, unit: median over repeats. floor, share: None without a roofline. Or `failed`: why not."""


def micro_figures(engine: MeasuredEngine, plan: MicroPlan, roofline: Roofline | None, seed: int) -> Iterator[Figure]:
    """All figures, each as it is found. One that fails says so, and the others go on."""
    micro = Micro(engine, plan, roofline, seed)
    for context in plan.contexts:
        yield from micro.attempt(f"decode at {context}", lambda context=context: micro.decode(context))  # type: ignore[misc]
    yield from micro.attempt(f"{plan.sequences} sequences at {plan.sequence_tokens}", micro.many)
    yield from micro.attempt(f"prefill of {plan.prompt}", micro.prefill)
    share = engine.host_share()
    yield {"figure": "host's share of a step", "value": share, "unit": "", "floor": None, "share": None}


class Micro:
    """Measures one engine. Every figure begins with an empty cache, and is warmed up by a run that is not counted."""

    def __init__(self, engine: MeasuredEngine, plan: MicroPlan, roofline: Roofline | None, seed: int) -> None:
        self._engine = engine
        self._plan = plan
        self._roofline = roofline
        self._seed = seed
        self._role = engine.role_names[0]

    @staticmethod
    def attempt(name: str, measure: Callable[[], list[Figure]]) -> list[Figure]:
        """What `measure` gives, or why it gives nothing."""
        try:
            return measure()
        except LRAgentError as error:
            return [{"figure": name, "failed": str(error)}]

    def decode(self, context: int) -> list[Figure]:
        """Milliseconds per token of one sequence, and to the first token after a few new ones, as an agent's step."""
        plan, append = self._plan, self._plan.append
        ids = self._tokens(context, context)
        gaps: list[float] = []
        firsts: list[float] = []
        self._engine.begin()
        self._ask(ids, 1)
        for repeat in range(plan.repeats + 1):
            times = self._ask(ids + self._tokens(append, context + 1 + repeat), plan.tokens).times
            if repeat:
                gaps += [after - before for before, after in itertools.pairwise(times)]
                firsts.append(times[0])
        step, first = statistics.median(gaps), statistics.median(firsts)
        floors: tuple[float | None, float | None] = (None, None)
        if self._roofline is not None:
            work = Work(self._role, context + append, append, 0, 1)
            floors = self._roofline.decode_s(context + append + plan.tokens // 2), self._roofline.prefill_s(work)
        after = _time(f"first token after {append} new at {context}", first, floors[1])
        return [_time(f"decode at {context}", step, floors[0]), {**after, "decode_steps": round(first / step, 3)}]

    def many(self) -> list[Figure]:
        """Tokens a second of many sequences while all decode: from the last one's first token to the first one's end.

        Their contexts are computed beforehand, so that all begin to decode in the same few steps.
        """
        plan = self._plan
        self._engine.begin()
        rates = []
        contexts = [self._tokens(plan.sequence_tokens, 1_000 + number) for number in range(plan.sequences)]
        self._ask_all(contexts, 1)
        for repeat in range(plan.repeats + 1):
            fresh = [self._tokens(plan.append, 10_000 * (repeat + 1) + number) for number in range(plan.sequences)]
            longer = [context + new for context, new in zip(contexts, fresh, strict=True)]
            spans = [
                [begin + moment for moment in answer.times] for begin, answer in self._ask_all(longer, plan.tokens)
            ]
            start, end = max(span[0] for span in spans), min(span[-1] for span in spans)
            inside = sum(start < moment <= end for span in spans for moment in span)
            if end <= start:
                raise LRAgentError("the sequences never decoded all at once; ask for more `tokens`.")
            if repeat:
                rates.append(inside / (end - start))
        rate = statistics.median(rates)
        floor = None
        if self._roofline is not None:
            context = plan.sequence_tokens + plan.append + plan.tokens // 2
            floor = plan.sequences / self._roofline.decode_s(context, plan.sequences)
        name = f"{plan.sequences} sequences at {plan.sequence_tokens}"
        return [_figure(name, rate, "tokens/s", floor, floor and rate / floor)]

    def prefill(self) -> list[Figure]:
        """The rate of a long prompt that no cache holds, in operations that it needs."""
        plan, times = self._plan, []
        for repeat in range(plan.repeats + 1):
            self._engine.begin()
            answer = self._ask(self._tokens(plan.prompt, 100 + repeat), 1)
            if repeat:
                times.append(answer.times[0])
        seconds = statistics.median(times)
        floor = rate = None
        if self._roofline is not None:
            work = Work(self._role, plan.prompt, plan.prompt, 0, 1)
            floor = self._roofline.prefill_s(work)
            rate = self._roofline.prefill_operations(work) / seconds / 1e12
        figure = _time(f"prefill of {plan.prompt}", seconds, floor)
        figure["tflops"] = None if rate is None else float(f"{rate:.4g}")
        return [figure]

    def _tokens(self, count: int, number: int) -> list[int]:
        return random_tokens(count, self._engine.vocabulary, self._seed * 1_000_003 + number)

    def _ask(self, ids: list[int], answer: int) -> Answer:
        return self._ask_all([ids], answer)[0][1]

    def _ask_all(self, prompts: list[list[int]], answer: int) -> list[tuple[float, Answer]]:
        """All at once; each answer with the moment at which it was asked for, in seconds."""

        async def one(prompt: list[int]) -> tuple[float, Answer]:
            begin = time.perf_counter()
            return begin, await self._engine.client.ask(self._role, prompt, answer)

        async def go() -> list[tuple[float, Answer]]:
            return await asyncio.gather(*(one(prompt) for prompt in prompts))

        return asyncio.run(go())


def _time(name: str, seconds: float, floor: float | None) -> Figure:
    return _figure(name, seconds * 1e3, "ms", floor and floor * 1e3, floor and floor / seconds)


def _figure(name: str, value: float, unit: str, floor: float | None, share: float | None) -> Figure:
    shown = [None if number is None else float(f"{number:.5g}") for number in (value, floor, share)]
    return {"figure": name, "value": shown[0], "unit": unit, "floor": shown[1], "share": shown[2]}
