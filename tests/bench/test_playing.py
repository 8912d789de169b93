"""Trajectories are played whole, in any number at once, and nothing that fails is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence

import pytest
import torch

from lragent.bench.clients import Answer, Client, Cost
from lragent.bench.engines import Base, EngineOptions, MeasuredEngine, NoRoomError, same_weights
from lragent.bench.playing import Load, Played, play
from lragent.bench.shapes import SHAPES
from lragent.bench.traces import Planned, paper_trace, trace_slots, trace_tokens, trace_work
from lragent.errors import LRAgentError
from lragent.modes import SharingMode

CPU = torch.device("cpu")
TRACE = [Planned("plan", 20, 4), Planned("action", 3, 4), Planned("plan", 3, 2)]
BASE = Base(CPU, torch.float32, SHAPES["tiny"])
OPTIONS = EngineOptions(slots=4096, positions=512, sequences=8)


def run(client: Client, load: Load, trace: Sequence[Planned] = TRACE, seed: int = 0) -> Played:
    return asyncio.run(play(client, trace, load, vocabulary=300, seed=seed))


@pytest.fixture(params=SharingMode, ids=str)
def engine(request: pytest.FixtureRequest) -> Iterator[MeasuredEngine]:
    made = MeasuredEngine(BASE, BASE.load(), request.param, 3, OPTIONS)
    yield made
    made.close()


class Fake:
    """Answers with a token for each role, and notes what it was asked; one of `broken` fails."""

    def __init__(self, broken: Sequence[str] = (), short: Sequence[str] = ()) -> None:
        self.asked: list[tuple[str, list[int], int]] = []
        self.broken, self.short = broken, short
        self.open = self.most = 0

    async def ask(self, role: str, prompt: Sequence[int], answer: int) -> Answer:
        self.asked.append((role, list(prompt), answer))
        self.open += 1
        self.most = max(self.most, self.open)
        await asyncio.sleep(0.01)
        self.open -= 1
        if role in self.broken:
            raise LRAgentError("out of order")
        answer -= role in self.short
        return Answer((7,) * answer, tuple(0.1 * (i + 1) for i in range(answer)), answer, Cost(len(prompt)))


def test_a_context_goes_on_with_the_answers() -> None:
    client = Fake()
    played = run(client, Load())
    assert [(role, len(prompt), answer) for role, prompt, answer in client.asked] == [
        ("plan", 20, 4), ("action", 27, 4), ("plan", 34, 2),
    ]  # fmt: skip
    first, second, third = (prompt for _, prompt, _ in client.asked)
    assert second[:24] == [*first, 7, 7, 7, 7]
    assert third[:31] == [*second, 7, 7, 7, 7]
    assert played.tokens == trace_tokens(TRACE) == 36
    record = played.records[1]
    assert (record.trajectory, record.step, record.role, record.prompt, record.generated) == (0, 1, "action", 27, 4)
    assert record.ttft_s == pytest.approx(0.1)
    assert record.gaps_s == pytest.approx([0.1] * 3)


def test_many_at_once_have_tokens_of_their_own() -> None:
    client = Fake()
    played = run(client, Load(5, 2))
    assert client.most == 2
    assert len(played.records) == 15
    assert played.tokens == 5 * trace_tokens(TRACE)
    assert len({tuple(prompt[:20]) for _, prompt, _ in client.asked}) == 5


def test_seeds_decide_the_tokens() -> None:
    clients = [Fake(), Fake(), Fake()]
    for client, seed in zip(clients, (0, 0, 1), strict=True):
        run(client, Load(), seed=seed)
    assert clients[0].asked == clients[1].asked != clients[2].asked


def test_arrivals_are_random_and_as_many_as_the_rate_says() -> None:
    starts = Load(2000, 2000, rate=10.0).starts(seed=3)
    assert starts == Load(2000, 2000, rate=10.0).starts(seed=3) == sorted(starts)
    assert starts[0] == 0
    assert starts[-1] == pytest.approx(200, rel=0.1)
    assert len(run(Fake(), Load(4, 4, rate=100.0)).records) == 12


def test_a_failure_ends_its_trajectory_and_is_named() -> None:
    played = run(Fake(broken=["action"]), Load(2, 2))
    assert [record.role for record in played.records] == ["plan", "plan"]
    assert played.failures == [f"trajectory {i}, step 2 (action, 27 tokens): out of order" for i in (0, 1)]


def test_a_short_answer_is_a_failure() -> None:
    assert "4 tokens were asked for and 3 came" in run(Fake(short=["action"]), Load()).failures[0]


def test_an_engine_computes_what_its_mode_must(engine: MeasuredEngine) -> None:
    trace = paper_trace(8, engine.role_names)[:8]
    trace[0] = Planned("plan", 30, 5)
    for _ in range(2):  # the cache is emptied before each run: nothing is found of the one before
        engine.begin()
        played = run(engine.client, Load(), trace)
        assert played.failures == []
        works = trace_work(trace, engine.mode)
        costs = [record.cost for record in played.records]
        assert [cost.computed for cost in costs] == [work.full + work.lr_only for work in works]
        assert [cost.base_reused for cost in costs] == [work.start + work.lr_only for work in works]
        assert played.tokens == trace_tokens(trace)


def test_an_engines_memory_is_what_its_slots_hold(engine: MeasuredEngine) -> None:
    engine.begin()
    played = run(engine.client, Load(3, 3))
    memory, tokens = engine.memory(), 3 * trace_tokens(TRACE)
    kv_bytes, lr_bytes = 2 * 2 * 2 * 16 * 4, 2 * 8 * 4
    slack = 3 * 64 * 2
    slots = 3 * trace_slots(TRACE, engine.mode)
    of_base = slots if engine.mode is SharingMode.NON_SHARED else tokens
    assert of_base - 3 * len(TRACE) * 2 <= memory.base / kv_bytes <= of_base + slack
    if engine.mode.decomposed:
        assert slots - 3 * len(TRACE) * 2 <= memory.lr / lr_bytes <= slots + slack
    else:
        assert memory.lr == 0
    beside = lr_bytes if engine.mode is SharingMode.BASE_LR_SHARED else 0  # base_shared has one memory for both
    assert memory.reserved == engine.slots * (kv_bytes + beside)
    assert memory.weights > 4 * 80_000
    assert memory.other is None
    assert played.failures == []
    assert engine.counters().preempted == engine.counters().base_evicted == 0


def test_a_cache_too_small_is_seen() -> None:
    options = EngineOptions(slots=80, positions=512, sequences=8)
    engine = MeasuredEngine(BASE, BASE.load(), SharingMode.BASE_LR_SHARED, 3, options)
    engine.begin()
    played = run(engine.client, Load(4, 4))
    counters = engine.counters()
    engine.close()
    assert played.failures == []
    assert counters.preempted + counters.base_evicted > 0


def test_a_cache_that_does_not_fit() -> None:
    options = EngineOptions(slots=10**12, positions=512, sequences=8)
    with pytest.raises(NoRoomError):
        MeasuredEngine(BASE, BASE.load(), SharingMode.BASE_LR_SHARED, 3, options, strict=True)


def test_engines_over_the_same_weights_answer_alike() -> None:
    model = BASE.load()
    twin = same_weights(model)
    assert [p.data_ptr() for p in model.parameters()] == [p.data_ptr() for p in twin.parameters()]
    answers = []
    for one in (model, twin):
        engine = MeasuredEngine(BASE, one, SharingMode.NON_SHARED, 3, OPTIONS)
        answers.append(asyncio.run(engine.client.ask("plan", list(range(30)), 6)).token_ids)
        engine.close()
    assert answers[0] == answers[1]


def test_an_engine_that_refuses_is_a_failure() -> None:
    engine = MeasuredEngine(BASE, BASE.load(), SharingMode.BASE_LR_SHARED, 3, OPTIONS)
    played = run(engine.client, Load(), [Planned("plan", 20, 2), Planned("nobody", 3, 4)])
    engine.close()
    assert len(played.records) == 1
    assert "nobody" in played.failures[0]
