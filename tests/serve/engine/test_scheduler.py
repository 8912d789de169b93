"""What each step takes, and that no sequence and no slot is ever lost, on a real cache without a model."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_tokenizer

from lragent.modes import SharingMode
from lragent.serve.cache.role_cache import Reader, RoleCache
from lragent.serve.engine.detokenizer import Detokenizer
from lragent.serve.engine.sampler import Sampler
from lragent.serve.engine.scheduler import Scheduler
from lragent.serve.engine.sequence import EngineRole, Piece, Sequence
from lragent.serve.engine.types import GenerationRequest, Prompt, SamplingParams

ROLES = [EngineRole(name, i + 1, Reader(f"{name}'s", 101 + i)) for i, name in enumerate(("plan", "action"))]


@dataclass
class Harness:
    """An engine's loop with the model left out: the token after position n is a function of what is before it."""

    mode: SharingMode = SharingMode.BASE_LR_SHARED
    slots: int = 100
    max_sequences: int = 4
    token_budget: int = 8
    growth: int = 1
    count: int = 0
    finished: list[Sequence] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.cache = RoleCache(self.mode, self.slots, lr_per_slot=4, a_digest="A", growth=self.growth)
        self.cache.set_live_writers([role.reader.writer for role in ROLES])
        self.scheduler = Scheduler(self.cache, self.max_sequences, self.token_budget)
        self.tokenizer = tiny_tokenizer()

    def add(self, prompt: list[int], answer: int = 3, role: EngineRole = ROLES[0], salt: str = "") -> Sequence:
        self.count += 1
        params = SamplingParams(max_tokens=answer)
        sequence = Sequence(
            request=GenerationRequest(str(self.count), role.name, Prompt(tuple(prompt)), params, salt),
            role=role,
            tags=[role.reader.writer] * len(prompt),
            capacity=len(prompt) + answer,
            sampler=Sampler(params, 0),
            detokenizer=Detokenizer(self.tokenizer, ()),
            on_chunk=lambda _: None,
        )
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> list[Piece]:
        known = {id(s): s.computed for s in self.scheduler.running}
        pieces = self.scheduler.schedule()
        self.check(pieces, known)
        for piece in pieces:
            sequence = piece.sequence
            sequence.computed = piece.end
            if not piece.yields_token:
                continue
            if not sequence.generated:
                self.cache.commit(sequence.held, piece.end)
            token = answer_token(sequence.held.tokens[: sequence.held.length].tolist())
            sequence.generated.append(token)
            if len(sequence.generated) == sequence.request.params.max_tokens:
                self.scheduler.remove(sequence)
                self.finished.append(sequence)
            else:
                sequence.held.append(token, sequence.role.reader.writer)
        self.cache.check_integrity()
        return pieces

    def check(self, pieces: list[Piece], known: dict[int, int]) -> None:
        assert sum(piece.end - piece.start for piece in pieces) <= self.token_budget
        assert len({id(piece.sequence) for piece in pieces}) == len(pieces), "a sequence was taken twice"
        assert len(self.scheduler.running) <= self.max_sequences
        for piece in pieces:
            lease = piece.sequence.held
            assert piece.start == piece.sequence.computed < piece.end <= lease.length
            assert known.get(id(piece.sequence), piece.start) == piece.start
            assert lease.reserved >= piece.end, "a piece has no slots"
            assert piece.sequence in self.scheduler.running

    def run(self, most: int = 2000) -> None:
        """To the end; fails where it does not come."""
        for _ in range(most):
            if not (self.scheduler.waiting or self.scheduler.running):
                break
            assert self.step(), "there is something to do and nothing is done"
        left = [*self.scheduler.waiting, *self.scheduler.running]
        assert not left, "the scheduler does not come to an end"
        self.cache.clear()
        self.cache.check_integrity()
        assert self.cache.base_pool.used_count == self.cache.lr_pool.used_count == 0


def answer_token(context: list[int]) -> int:
    return (sum(context) * 31 + len(context)) % 250


def expected_answer(sequence: Sequence) -> list[int]:
    context = list(sequence.request.prompt.token_ids)
    for _ in range(sequence.request.params.max_tokens):
        context.append(answer_token(context))
    return context[len(sequence.request.prompt.token_ids) :]


def spans(pieces: list[Piece]) -> list[tuple[str, int, int]]:
    return [(piece.sequence.request.request_id, piece.start, piece.end) for piece in pieces]


def test_a_long_prompt_is_cut_to_the_budget() -> None:
    harness = Harness()
    harness.add(list(range(19)))
    assert [spans(harness.step()) for _ in range(4)] == [
        [("1", 0, 8)],
        [("1", 8, 16)],
        [("1", 16, 19)],
        [("1", 19, 20)],
    ]


def test_what_decodes_goes_before_what_prefills() -> None:
    harness = Harness()
    harness.add(list(range(30)))
    harness.add([50, 51], answer=9)
    for _ in range(4):
        harness.step()  # the second has its first token when the first's prompt is done
    harness.add(list(range(100, 130)))
    assert spans(harness.step()) == [("1", 30, 31), ("2", 2, 3), ("3", 0, 6)]


def test_what_came_later_and_decodes_goes_before_a_long_prefill() -> None:
    harness = Harness()
    harness.add(list(range(30)))
    harness.add([50])
    assert spans(harness.step()) == [("2", 0, 1), ("1", 0, 7)]
    assert spans(harness.step()) == [("2", 1, 2), ("1", 7, 14)]


def test_what_was_preempted_goes_before_what_came_later() -> None:
    harness = Harness(slots=24, max_sequences=2, token_budget=16)
    for start in (0, 50, 100):
        harness.add(list(range(start, start + 3)), answer=18)
    while not harness.scheduler.preempted:
        harness.step()
    assert [s.request.request_id for s in harness.scheduler.waiting] == ["2", "3"]
    harness.run()
    assert [s.request.request_id for s in harness.finished] == ["1", "2", "3"]


def test_first_come_first_served() -> None:
    harness = Harness(max_sequences=2)
    for start in (0, 50, 100):
        harness.add(list(range(start, start + 4)), answer=2)
    assert spans(harness.step()) == [("1", 0, 4), ("2", 0, 4)]
    harness.run()
    assert [s.request.request_id for s in harness.finished] == ["1", "2", "3"]


@pytest.mark.parametrize("mode", list(SharingMode))
def test_the_last_is_preempted_and_resumes_with_its_answer_so_far(mode: SharingMode) -> None:
    harness = Harness(mode, slots=25, token_budget=16)
    first, second = harness.add([1, 2, 3], answer=15), harness.add([4, 5, 6], answer=12)
    while first not in harness.finished:
        harness.step()
        assert first in (*harness.scheduler.running, *harness.finished), "the first was preempted for the second"
    assert harness.scheduler.preempted > 0
    assert second.generated
    harness.run()
    assert [s.generated for s in harness.finished] == [expected_answer(s) for s in harness.finished]
    assert second.usage().prompt_tokens == 3
    assert second.usage().tokens_computed == 3, "what a preemption costs is not the prompt's"


def test_a_preempted_sequence_waits_until_there_is_room() -> None:
    """Or it would be admitted and preempted anew in every step."""
    harness = Harness(slots=40, token_budget=64)
    for start in (0, 50, 100):
        harness.add(list(range(start, start + 10)), answer=25)
    harness.run()
    assert 0 < harness.scheduler.preempted <= 4


def test_a_cancelled_head_of_the_queue_does_not_block_the_others() -> None:
    harness = Harness(slots=40, token_budget=64)
    harness.add(list(range(20)), answer=10)
    harness.step()
    large, small = harness.add(list(range(100, 130))), harness.add([200, 201])
    harness.step()
    assert list(harness.scheduler.waiting) == [large, small]
    harness.scheduler.remove(large)
    assert small in [piece.sequence for piece in harness.step()]
    harness.run()


def test_what_a_cancelled_sequence_computed_stays_cached() -> None:
    harness = Harness()
    cancelled = harness.add(list(range(20)))
    harness.step()
    harness.scheduler.remove(cancelled)
    harness.cache.check_integrity()
    assert cancelled.lease is None
    again = harness.add(list(range(20)))
    assert spans(harness.step()) == [("2", 8, 16)]
    assert again.usage().base_reused == 8


REQUESTS = st.lists(
    st.tuples(
        st.integers(0, 12),  # steps that pass before it comes
        st.lists(st.integers(0, 2), min_size=1, max_size=14),
        st.integers(1, 10),  # tokens of its answer
        st.sampled_from(ROLES),
        st.sampled_from(["", "tenant"]),
        st.none() | st.integers(0, 6),  # steps after which it is cancelled
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(list(SharingMode)),
    REQUESTS,
    st.integers(24, 60),
    st.integers(1, 20),
    st.integers(1, 5),
    st.sampled_from([1, 64]),
)
def test_every_request_ends_with_its_answer(mode, requests, slots, budget, sequences, growth) -> None:
    harness = Harness(mode, slots, sequences, budget, growth)
    cancelled = 0
    leaving: list[tuple[int, Sequence]] = []
    now = 0
    for pause, prompt, answer, role, salt, patience in requests:
        for _ in range(pause):
            harness.step()
            now += 1
        sequence = harness.add(prompt, answer, role, salt)
        if patience is not None:
            leaving.append((now + patience, sequence))
        for when, each in list(leaving):
            if when <= now and each not in harness.finished:
                harness.scheduler.remove(each)
                leaving.remove((when, each))
                cancelled += 1
    harness.run()
    assert len(harness.finished) == len(requests) - cancelled
    for sequence in harness.finished:
        assert sequence.generated == expected_answer(sequence)
        usage = sequence.usage()
        assert usage.tokens_computed + usage.base_reused - usage.lr_prefilled == usage.prompt_tokens
