"""What each step takes, and that no sequence and no slot is ever lost, on a real cache without a model."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduling import ROLES, Harness, expected_answer, spans

from lragent.modes import SharingMode
from lragent.serve.engine.sequence import Sequence


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
    for _ in range(5):
        harness.step()
    harness.add(list(range(100, 130)))
    assert spans(harness.step()) == [("1", 30, 31), ("2", 6, 7), ("3", 0, 6)]


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
    harness = Harness(mode, slots=20, token_budget=16)
    first, second = harness.add([1, 2, 3], answer=15), harness.add([4, 5, 6], answer=12)
    while first not in harness.finished:
        harness.step()
        assert first in (*harness.scheduler.running, *harness.finished), "the first was preempted for the second"
    assert harness.scheduler.preempted > 0
    assert second.generated
    harness.run()
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
    large = harness.add(list(range(100, 130)))
    harness.step()
    small = harness.add([200, 201])
    harness.step()
    assert harness.scheduler.waiting == [large, small], "whoever waits for room is not passed for ever"
    harness.cancel(large)
    assert small in [piece.sequence for piece in harness.step()]
    harness.run()


def test_what_a_cancelled_sequence_computed_stays_cached() -> None:
    harness = Harness()
    cancelled = harness.add(list(range(20)))
    harness.step()
    harness.cancel(cancelled)
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
    st.booleans(),
)
def test_every_request_ends_with_its_answer(mode, requests, slots, budget, sequences, growth, overlap) -> None:
    harness = Harness(mode, slots, sequences, budget, growth, overlap=overlap)
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
            if when <= now:
                harness.cancel(each)
                leaving.remove((when, each))
    harness.run()
    assert len(harness.finished) == len(requests) - len(harness.cancelled)
    for sequence in harness.finished:
        assert sequence.generated == expected_answer(sequence)
        usage = sequence.usage()
        assert usage.tokens_computed + usage.base_reused - usage.lr_prefilled == usage.prompt_tokens
