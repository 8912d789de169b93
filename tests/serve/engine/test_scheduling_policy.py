"""Who goes first and that nobody starves; what is handed in when, and what a step in flight must not change."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduling import ROLES, Harness, answer_token, spans

from lragent.modes import SharingMode

each_mode = pytest.mark.parametrize("mode", list(SharingMode))


def test_a_hot_step_is_not_stuck_behind_a_long_prefill() -> None:
    harness = Harness(slots=100_000, token_budget=512, growth=64)
    long = harness.add([n % 250 for n in range(60_000)], answer=1)
    harness.step()
    for step in range(20):
        hot = harness.add([300 + step] * 8, answer=2)
        pieces = harness.step()
        assert [piece.end - piece.start for piece in pieces] == [8, 504]
        assert pieces[0].sequence is hot
        assert len(hot.generated) == 1, "the hot step has its first token in the step after it came"
        harness.step()
    assert long.computed == 512 + 20 * (504 + 511)


@pytest.mark.parametrize("long", [40, 200])
def test_nobody_starves(long: int) -> None:
    """New hot prompts fill every step, and still the long one ends, after about as many steps as it has budgets."""
    harness = Harness(slots=4000, token_budget=8, max_sequences=3)
    sequence = harness.add(list(range(long)), answer=1)
    other = 250
    chunks = long // 8
    for step in range(chunks * (chunks + 3)):
        while len(harness.scheduler.waiting) + len(harness.scheduler.running) < 3:
            other += 1
            harness.add([other * 7] * 8, answer=1)
        pieces = harness.step()
        if step == 0:
            assert pieces[0].sequence is not sequence
        if sequence in harness.finished:
            break
    assert sequence in harness.finished


@given(st.lists(st.integers(1, 60), min_size=1, max_size=30), st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_everybody_has_a_turn_within_a_bound(sizes: list[int], sequences: int) -> None:
    harness = Harness(slots=4000, token_budget=8, max_sequences=sequences)
    for at, size in enumerate(sizes):
        harness.add([1000 * at + n for n in range(size)], answer=1)
    most = sum(-(-size // 8) for size in sizes) + len(sizes)
    for _ in range(most):
        harness.step()
    harness.run()
    assert len(harness.finished) == len(sizes)


def test_a_hot_request_is_admitted_before_a_cold_one_that_came_earlier() -> None:
    harness = Harness(max_sequences=1, slots=300, token_budget=8)
    warm = list(range(40))
    harness.add(warm, answer=2)
    while len(harness.finished) < 1:
        harness.step()
    first, cold, hot = harness.add([90] * 30), harness.add([91] * 30), harness.add([*warm, 1, 2, 3])
    assert harness.step()[0].sequence is hot
    harness.run()
    assert harness.finished[1:] == [hot, first, cold]


def test_a_request_that_waited_long_is_admitted_before_hot_ones() -> None:
    harness = Harness(max_sequences=1, slots=300, token_budget=8)
    harness.add([1, 2], answer=30)
    harness.step()
    cold = harness.add([91] * 30)
    for _ in range(4):  # 32 tokens
        harness.step()
    hot = harness.add([5, 6])
    harness.run()
    assert harness.finished[1:] == [cold, hot]


def test_who_came_first_is_never_preempted_for_who_came_later() -> None:
    """Not even in a step in which the later one, as one that decodes, was taken already."""
    harness = Harness(slots=40, token_budget=6, max_sequences=4)
    first = harness.add(list(range(25)), answer=3)
    harness.step()
    later = [harness.add([50 + n], answer=20) for n in range(3)]
    while first not in harness.finished:
        harness.step()
        assert first in (*harness.scheduler.running, *harness.finished)
    assert harness.scheduler.preempted > 0
    harness.run()
    assert set(harness.finished) == {first, *later}


def test_a_prompt_is_admitted_only_where_those_who_run_have_room_too() -> None:
    harness = Harness(slots=50, token_budget=4)
    harness.add(list(range(30)), answer=2)
    harness.step()
    other = harness.add(list(range(100, 125)), answer=2)
    while harness.finished == []:
        harness.step()
        assert other.lease is None or harness.finished
    harness.run()
    assert harness.scheduler.preempted == 0


def test_rows_are_the_lowest_free_ones() -> None:
    harness = Harness(max_sequences=3, slots=200)
    one, two = harness.add([1], answer=9), harness.add([2], answer=9)
    waiting = [harness.add([3 + n], answer=9) for n in range(3)]
    harness.step()
    assert [s.row for s in (one, two, *waiting)] == [0, 1, 2, -1, -1]
    harness.cancel(one)
    assert one.row == -1
    harness.step()
    assert [s.row for s in (two, *waiting)] == [1, 2, 0, -1]


@each_mode
def test_a_prompt_is_handed_in_chunk_by_chunk(mode: SharingMode) -> None:
    harness = Harness(mode, slots=200)
    prompt = list(range(30))
    sequence = harness.add(prompt, answer=5)
    for computed in (8, 16, 24, 30):
        harness.step()
        assert harness.found(prompt).base_reused == min(computed, 30)
        assert sequence.held.committed == computed
    for _ in range(3):
        harness.step()
        assert sequence.held.committed == 30, "an answer is handed in when it ends"
    harness.run()


@each_mode
@pytest.mark.parametrize("stop", [1, 2, 5])
def test_a_step_past_the_end_is_not_handed_in(mode: SharingMode, stop: int) -> None:
    """With overlap, the step after the last token is launched before it is known to be the last."""
    harness = Harness(mode, slots=200, overlap=True)
    sequence = harness.add(list(range(10)), answer=9, stop=stop)
    while not harness.finished:
        harness.step()
    assert len(sequence.generated) == stop
    assert sequence.computed == 10 + stop
    context = [*range(10), *sequence.generated]
    assert harness.found(context).base_reused == 10 + stop - 1
    harness.check_end()


def test_what_waits_only_for_its_last_token_has_no_piece() -> None:
    harness = Harness(overlap=True)
    harness.add([1, 2, 3], answer=1)
    assert spans(harness.step()) == [("1", 0, 3)]
    assert harness.scheduler.running[0].in_flight == 1
    assert harness.step() == []
    assert len(harness.finished) == 1


@each_mode
def test_who_was_preempted_with_a_token_in_flight_waits_for_it(mode: SharingMode) -> None:
    harness = Harness(mode, slots=24, token_budget=16, overlap=True)
    harness.add([1, 2, 3], answer=15)
    second = harness.add([4, 5, 6], answer=12)
    while not harness.scheduler.preempted:
        harness.step()
    assert harness.scheduler.waiting[0] is second
    second.in_flight += 1  # as if the token were not known yet
    while len(harness.finished) < 1:
        harness.step()
    assert harness.step() == []
    assert second.lease is None
    second.in_flight -= 1
    harness.run()
    assert len(harness.finished) == 2


def test_a_resumed_sequence_hands_in_its_answer_so_far_but_for_the_last_token() -> None:
    harness = Harness(slots=20, token_budget=16)
    harness.add([1, 2, 3], answer=15)
    second = harness.add([4, 5, 6], answer=12)
    while not harness.scheduler.preempted:
        harness.step()
    assert len(second.generated) > 2
    while second.lease is None:
        harness.step()
    assert second.held.prompt == 3 + len(second.generated) - 1  # it drew one when it resumed
    assert second.held.committed >= second.held.prompt - 1
    harness.run()


def test_a_lone_sequence_whose_lr_entries_lie_in_too_many_pages_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its entries hold half-empty pages that it could fill only if they were together."""
    harness = Harness(SharingMode.BASE_SHARED, slots=40, token_budget=64, per=8)
    assert harness.slots == 45
    assert harness.cache.longest == 40
    pool = harness.cache.lr_pool
    others = pool.allocate(9 * 8)
    pool.free(others[::8])
    others = np.delete(others, np.s_[::8])
    harness.add(list(range(9)), answer=31)
    with monkeypatch.context() as patch:
        patch.setattr(harness.scheduler, "check_integrity", lambda: None)  # the others belong to nobody
        harness.step()
    pool.free(others)
    assert pool.page_count == 9
    harness.run()
    assert harness.scheduler.preempted == 1


@each_mode
@pytest.mark.parametrize("overlap", [False, True])
def test_a_token_is_what_comes_after_its_context(mode: SharingMode, overlap: bool) -> None:
    harness = Harness(mode, overlap=overlap)
    sequence = harness.add([7, 8], answer=4)
    harness.run()
    assert sequence.generated[0] == answer_token([7, 8])
    assert len(sequence.generated) == 4


@each_mode
def test_a_fork_takes_no_base_slot_for_what_is_shared(mode: SharingMode) -> None:
    """One history, then three roles that go on from it: in `base_shared` each writes its own LR cache of it."""
    harness = Harness(mode, slots=400, token_budget=64)
    history = list(range(50))
    harness.add(history, answer=1)
    harness.run_until_idle()
    counters = harness.cache.counters
    base, low = counters.base_allocated, counters.lr_allocated
    for at, role in enumerate(ROLES):
        harness.add([*history, 60 + at, 70], answer=2, role=role)
    harness.run_until_idle()
    new = 3 * 4 - 3  # two of each prompt and two of each answer, of which the last is not computed
    own_history = 50 if mode is SharingMode.NON_SHARED else 0
    assert counters.base_allocated - base == new + 2 * own_history
    if mode is SharingMode.BASE_SHARED:
        assert counters.lr_allocated - low == new + 2 * 50
    for role in ROLES:
        assert harness.found([*history, 60 + ROLES.index(role), 70], role).base_reused >= 51
    harness.check_end()


def agents(patience: int, slots: int, count: int = 6, turns: int = 10) -> tuple[int, int]:
    """Agents that each send their next step when the one before has ended. Tokens computed, and steps taken."""
    harness = Harness(slots=slots, max_sequences=count, token_budget=64)
    harness.scheduler.patience = patience
    contexts = [[1000 * agent + n for n in range(30)] for agent in range(count)]
    turn = dict.fromkeys(range(count), 0)
    asked = {agent: harness.add(contexts[agent], answer=4) for agent in range(count)}
    computed = 0
    for steps in range(20_000):
        computed += sum(piece.end - piece.start for piece in harness.step())
        for agent, sequence in list(asked.items()):
            if sequence not in harness.finished:
                continue
            del asked[agent]
            turn[agent] += 1
            if turn[agent] < turns:
                contexts[agent] += [*sequence.generated, *range(100 * turn[agent], 100 * turn[agent] + 15)]
                asked[agent] = harness.add(contexts[agent], answer=4)
        if not asked:
            harness.check_end()
            return computed, steps
    raise AssertionError("the agents do not come to an end")


def test_agents_that_overfill_the_cache_do_not_evict_one_another_in_turns() -> None:
    """All together need 1,300 slots at their ends. Whoever has lost its cache waits for others to end or to rest."""
    enough, _ = agents(0, 1400)
    eager, _ = agents(0, 700)
    patient, _ = agents(256, 700)
    assert enough < patient < 0.7 * eager, (enough, patient, eager)
    assert agents(256, 1400)[0] == enough


def test_who_stands_aside_has_its_turn_at_last() -> None:
    """Others come back for their entries for ever, and one who has none waits no longer than its patience."""
    harness = Harness(slots=130, max_sequences=3, token_budget=64)
    harness.scheduler.patience = 20
    rooms = [[1000 * agent + n for n in range(50)] for agent in range(2)]
    asked = [harness.add(room, answer=2) for room in rooms]
    for _ in range(30):  # both have their place, and are found in it
        harness.step()
        asked = [
            harness.add(room, answer=2) if s in harness.finished else s for s, room in zip(asked, rooms, strict=True)
        ]
    newcomer = harness.add([5000 + n for n in range(60)], answer=2)
    waited = 0
    while newcomer not in harness.finished:
        waited += 1
        harness.step()
        asked = [
            harness.add(room, answer=2) if s in harness.finished else s for s, room in zip(asked, rooms, strict=True)
        ]
        assert waited < 20 + 16 + 40
    assert harness.scheduler.stood_aside > 0
    assert waited > 15


def test_entries_that_nobody_has_come_back_for_are_taken_at_once() -> None:
    harness = Harness(slots=100, max_sequences=2, token_budget=64)
    for number in range(12):
        harness.add([1000 * number + n for n in range(40)], answer=4)
    harness.run()
    assert harness.scheduler.stood_aside == 0
