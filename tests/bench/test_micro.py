"""Single figures are worked out from the times of tokens as one would by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import pytest

from lragent.bench.clients import Answer, Cost
from lragent.bench.engines import MeasuredEngine
from lragent.bench.micro import Micro, micro_figures
from lragent.bench.roofline import Ceilings, ModelSize, Roofline
from lragent.bench.trace_plan import MicroPlan
from lragent.errors import LRAgentError, UserError

PLAN = MicroPlan(contexts=(100,), append=8, sequences=4, sequence_tokens=50, prompt=64, tokens=11, repeats=2)
SIZE = ModelSize(layers=2, hidden=4, inner=8, heads=2, kv_heads=1, head_dim=2, vocabulary=10, itemsize=2)


class Fake:
    """First tokens after 3 s, the others every 0.5 s; notes what it was asked."""

    vocabulary = 10
    role_names = ("plan",)

    def __init__(self, broken: bool = False) -> None:
        self.asked: list[tuple[list[int], int]] = []
        self.client = self
        self.broken = broken

    def begin(self) -> None: ...
    def host_share(self) -> float | None:
        return 0.25

    async def ask(self, role: str, prompt: Sequence[int], answer: int) -> Answer:
        self.asked.append((list(prompt), answer))
        if self.broken:
            raise LRAgentError("out of order")
        times = tuple(3.0 + 0.5 * number for number in range(answer))
        return Answer((1,) * answer, times, answer, Cost())


def micro(engine: Fake, roofline: Roofline | None = None) -> Micro:
    return Micro(cast(MeasuredEngine, engine), PLAN, roofline, seed=0)


def test_decode_and_append() -> None:
    engine = Fake()
    decode, append = micro(engine, Roofline(SIZE, Ceilings(copy=1e6, products=1e30))).decode(100)
    assert (decode["value"], append["value"], append["decode_steps"]) == (500, 3000, 6)
    assert decode["floor"] == pytest.approx(1e3 * (656 + 16 * (100 + 8 + 5)) / 1e6)
    assert decode["share"] == pytest.approx(decode["floor"] / 500, rel=1e-4)
    first, *others = engine.asked
    assert (len(first[0]), first[1]) == (100, 1)
    assert len(others) == 3  # one to warm up
    assert all(prompt[:100] == first[0] and len(prompt) == 108 and answer == 11 for prompt, answer in others)
    assert len({tuple(prompt) for prompt, _ in others}) == 3


def test_many_count_only_while_all_decode() -> None:
    (figure,) = micro(Fake(), Roofline(SIZE, Ceilings(copy=1e6, products=1e30))).many()
    # Ten tokens in five seconds, four times; the moments at which they were asked differ by a little.
    assert figure["value"] == pytest.approx(8.0, rel=0.11)
    assert figure["floor"] == pytest.approx(4e6 / (656 + 4 * 16 * (50 + 8 + 5)), rel=1e-4)


def test_a_prefill_is_rated_by_its_operations() -> None:
    roofline = Roofline(SIZE, Ceilings(copy=1e30, products=1e6))
    (figure,) = micro(Fake(), roofline).prefill()
    operations = 2 * (64 * 288 + 40) + 32 * 64 * 65 / 2
    assert (figure["value"], figure["floor"]) == (3000, pytest.approx(operations / 1e3, rel=1e-4))
    assert figure["tflops"] == pytest.approx(operations / 3 / 1e12, rel=1e-3)


def test_without_a_roofline_there_are_no_shares() -> None:
    figures = list(micro_figures(cast(MeasuredEngine, Fake()), PLAN, None, 0))
    assert [figure["share"] for figure in figures] == [None] * 5
    assert figures[-1]["value"] == 0.25


def test_what_fails_is_said_and_the_others_go_on() -> None:
    figures: list[dict[str, Any]] = list(micro_figures(cast(MeasuredEngine, Fake(broken=True)), PLAN, None, 0))
    assert [figure.get("failed") for figure in figures] == ["out of order"] * 3 + [None]


def test_a_plan_holds_what_it_asks_for() -> None:
    assert PLAN.positions > 100 + 8 + 11
    assert PLAN.slots >= 4 * (50 + 3 * 19)
    with pytest.raises(UserError, match="micro"):
        MicroPlan(contexts=())
    with pytest.raises(UserError, match="micro"):
        MicroPlan(prompt=0)
