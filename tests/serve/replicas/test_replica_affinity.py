"""Which replica a prompt goes to."""

from __future__ import annotations

from collections import Counter

import numpy as np
import numpy.typing as npt
from hypothesis import given, settings
from hypothesis import strategies as st

from lragent.serve.replicas.affinity import WORTH_TOKENS, Affinity, Load

IDLE = {0: Load(0, 8), 1: Load(0, 8)}


def prompt(*parts: tuple[int, int]) -> npt.NDArray[np.int32]:
    """Tokens made of (seed, length) parts."""
    return np.concatenate([np.random.default_rng(seed).integers(0, 50_000, length) for seed, length in parts]).astype(
        np.int32
    )


def test_a_trajectory_stays_and_new_ones_take_turns() -> None:
    affinity, system = Affinity(), (99, 300)
    first = {each: affinity.choose("", prompt(system, (each, 20)), IDLE) for each in range(7)}
    assert sorted(Counter(first.values()).values()) == [3, 4]
    for turn in range(1, 5):
        for each in range(7):
            grown = prompt(system, (each, 20), *((100 * each + at, 7) for at in range(turn)))
            assert affinity.choose("", grown, IDLE) == first[each]
    affinity.check_integrity()


def test_a_system_prompt_asked_by_itself_does_not_draw_all_trajectories_to_one() -> None:
    affinity, system = Affinity(), (99, 300)
    affinity.choose("", prompt(system), IDLE)
    chosen = Counter(affinity.choose("", prompt(system, (each, 20)), IDLE) for each in range(10))
    assert max(chosen.values()) <= 6


def test_branches_of_a_long_context_stay_with_it_and_those_of_a_short_one_spread() -> None:
    for length, spread in ((WORTH_TOKENS, 1), (WORTH_TOKENS // 2, 2)):
        affinity = Affinity()
        affinity.choose("", prompt((1, length)), IDLE)
        chosen = {affinity.choose("", prompt((1, length), (each, 5)), IDLE) for each in range(2, 8)}
        assert len(chosen) == spread


def test_a_trajectory_leaves_a_full_replica_only_for_one_with_a_seat() -> None:
    affinity = Affinity()
    own = affinity.choose("", prompt((1, 50)), IDLE)
    other = 1 - own
    full, busy = Load(8, 8), Load(7, 8)
    assert affinity.choose("", prompt((1, 50), (2, 5)), {own: busy, other: Load(0, 8)}) == own
    assert affinity.choose("", prompt((1, 50), (2, 9)), {own: full, other: full}) == own
    assert affinity.choose("", prompt((1, 50), (2, 13)), {own: full, other: busy}) == other
    assert affinity.choose("", prompt((1, 50), (2, 13), (3, 5)), IDLE) == other  # where its cache is by now


def test_new_trajectories_go_to_the_least_loaded() -> None:
    affinity = Affinity()
    assert {affinity.choose("", prompt((each, 9)), {0: Load(3, 8), 1: Load(2, 8)}) for each in range(5)} == {1}


def test_tenants_do_not_share_what_is_known() -> None:
    affinity = Affinity()
    own = affinity.choose("one", prompt((1, 50)), IDLE)
    loads = {own: Load(1, 8), 1 - own: Load(0, 8)}
    assert affinity.choose("two", prompt((1, 50), (2, 5)), loads) == 1 - own
    assert affinity.choose("one", prompt((1, 50), (2, 5)), loads) == own


def test_what_a_lost_replica_held_goes_to_others_and_is_held_there() -> None:
    affinity = Affinity()
    own = affinity.choose("", prompt((1, 50)), IDLE)
    affinity.lost_one()
    left = {1 - own: Load(5, 8)}
    assert affinity.choose("", prompt((1, 50), (2, 5)), left) == 1 - own
    affinity.check_integrity()
    assert affinity.choose("", prompt((1, 50), (2, 5), (3, 5)), left | {7: Load(0, 8)}) == 1 - own


def test_what_a_lost_replica_held_does_not_hide_a_shorter_prompt_that_another_holds() -> None:
    affinity, context = Affinity(), (1, WORTH_TOKENS)
    own = affinity.choose("", prompt(context), IDLE)
    assert affinity.choose("", prompt(context, (2, 5)), {own: Load(8, 8), 1 - own: Load(0, 8)}) == 1 - own
    affinity.lost_one()
    assert affinity.choose("", prompt(context, (2, 5), (3, 5)), {own: Load(7, 8), 7: Load(0, 8)}) == own
    affinity.check_integrity()


sizes = st.sampled_from([0, 5, 9, 14, WORTH_TOKENS, WORTH_TOKENS + 5, WORTH_TOKENS + 9])
asked_of_three = st.lists(st.tuples(sizes, st.tuples(*[st.sampled_from([0, 1, 4])] * 3), st.booleans()), max_size=30)


@settings(max_examples=300, deadline=None)
@given(asked_of_three)
def test_forgetting_bit_by_bit_chooses_as_forgetting_at_once(
    asked: list[tuple[int, tuple[int, int, int], bool]],
) -> None:
    affinity, at_once = Affinity(), Affinity()
    loads = {number: Load(0, 4) for number in range(3)}
    for length, busy, goes in asked:
        loads = {number: Load(at, 4) for number, at in zip(loads, busy, strict=True)}
        ids = prompt((1, length))
        chosen = affinity.choose("", ids, loads)
        assert chosen == at_once.choose("", ids, loads)
        if goes:
            loads = {number: load for number, load in loads.items() if number != chosen} | {max(loads) + 1: Load(0, 4)}
            affinity.lost_one()
            at_once.lost_one()
            for name in [name for name, known in at_once._known.items() if known.replica == chosen]:
                at_once._drop(name)
        affinity.check_integrity()


def test_a_loss_keeps_nobody_waiting_while_all_that_is_known_is_looked_through() -> None:
    affinity = Affinity()
    affinity.choose("", prompt((1, 50)), IDLE)
    known, affinity._known = affinity._known, None  # type: ignore[assignment]  # whoever looks fails
    affinity.lost_one()
    affinity._known = known


turns = st.tuples(
    st.sampled_from(["", "tenant"]), st.integers(0, 3), st.integers(0, 40), st.integers(0, 30), st.booleans()
)


@settings(max_examples=60, deadline=None)
@given(st.lists(turns, max_size=60))
def test_memory_is_bounded_and_the_choice_is_one_of_those_there(asked: list[tuple[str, int, int, int, bool]]) -> None:
    affinity = Affinity(remembered=12)
    loads = {0: Load(0, 4), 1: Load(0, 4)}
    for salt, seed, length, busy, goes in asked:
        loads = {number: Load((busy * number) % 6, 4) for number in loads}
        assert affinity.choose(salt, prompt((seed, length)), loads) in loads
        if goes:
            gone = min(loads)
            affinity.lost_one()
            loads = {number: load for number, load in loads.items() if number != gone} | {max(loads) + 1: Load(0, 4)}
        affinity.check_integrity()
