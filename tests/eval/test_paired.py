"""Two ways on the same questions: known values, what holds for all, and whether the intervals hold what they say."""

from __future__ import annotations

import itertools
from fractions import Fraction
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lragent.eval.paired import Paired, interval

counts = st.integers(0, 40)
pairs = st.builds(Paired, counts, counts, counts, counts).filter(lambda pair: pair.total > 0)


def swapped(pair: Paired) -> Paired:
    return Paired(pair.both, pair.only_second, pair.only_first, pair.neither)


def test_counts_of_four_cells() -> None:
    pair = Paired.of([True, True, False, False, False], [True, False, True, True, False])
    assert pair == Paired(both=1, only_first=1, only_second=2, neither=1)
    assert (pair.total, pair.difference) == (5, 0.2)
    with pytest.raises(ValueError, match="shorter"):
        Paired.of([True, True], [True])


@given(pairs)
def test_the_difference_is_antisymmetric_and_the_p_value_symmetric(pair: Paired) -> None:
    assert swapped(pair).difference == -pair.difference
    assert swapped(pair).mcnemar == pair.mcnemar
    assert pair.difference == pytest.approx(
        (pair.both + pair.only_second) / pair.total - (pair.both + pair.only_first) / pair.total
    )


@given(counts, counts)
def test_mcnemar_is_the_binomial_test_of_a_fair_coin(few: int, many: int) -> None:
    n = few + many
    as_likely = sum(Fraction(comb(n, k), 2**n) for k in range(n + 1) if comb(n, k) <= comb(n, few))
    assert Paired(3, few, many, 2).mcnemar == pytest.approx(float(as_likely))


@pytest.mark.parametrize(("first", "second"), list(itertools.product(range(5), repeat=2)))
def test_mcnemar_by_every_way_the_questions_could_have_gone(first: int, second: int) -> None:
    gap, n = abs(first - second), first + second
    ways = [abs(2 * sum(way) - n) >= gap for way in itertools.product((0, 1), repeat=n)]
    assert Paired(0, first, second, 9).mcnemar == pytest.approx(sum(ways) / len(ways))


@pytest.mark.parametrize(
    ("first", "second", "p"),
    [(0, 0, 1.0), (0, 1, 1.0), (0, 5, 0.0625), (1, 9, 0.021484375), (5, 5, 1.0), (10, 20, 0.09873714670538902)],
)
def test_known_p_values(first: int, second: int, p: float) -> None:
    assert Paired(7, first, second, 0).mcnemar == pytest.approx(p, rel=1e-12)


def test_p_values_of_many_questions() -> None:
    pair = Paired(0, 4_900, 5_100, 0)
    z = (200 - 1) / 10_000**0.5  # with the correction for whole numbers
    assert pair.mcnemar == pytest.approx(2 * (1 - _normal(z)), rel=0.01)
    assert 0 <= Paired(0, 0, 5_000, 0).mcnemar < 1e-300


def _normal(z: float) -> float:
    from math import erf

    return 0.5 * (1 + erf(z / 2**0.5))


@settings(max_examples=30)
@given(st.lists(pairs, min_size=1, max_size=3))
def test_the_interval_holds_the_difference_and_is_the_mirrored_one_s_mirror(several: list[Paired]) -> None:
    difference = sum(pair.difference for pair in several) / len(several)
    low, high = interval(several)
    assert -1 <= low <= difference <= high <= 1
    other_low, other_high = interval([swapped(pair) for pair in several], seed=1)
    slack = 0.02 + 2 / min(pair.total for pair in several)  # two draws; and steps of one question
    assert other_low == pytest.approx(-high, abs=slack)
    assert other_high == pytest.approx(-low, abs=slack)


def test_it_is_the_bootstrap_over_questions() -> None:
    pair = Paired(50, 12, 4, 34)
    each = np.array([0] * 84 + [-1] * 12 + [1] * 4)
    rng = np.random.default_rng(7)
    means = each[rng.integers(0, 100, (20_000, 100))].mean(axis=1)
    assert interval([pair]) == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.011)


def test_seeds_are_drawn_within_themselves() -> None:
    """Two seeds that differ, each without chance within itself, leave no chance in their mean."""
    assert interval([Paired(0, 0, 10, 0), Paired(0, 10, 0, 0)]) == (0.0, 0.0)


def test_seeds_weigh_the_same_however_much_each_was_asked() -> None:
    many, few = Paired(1_000, 0, 2_000, 1_000), Paired(10, 10, 0, 20)
    low, high = interval([many, few])
    assert low < (many.difference + few.difference) / 2 < high
    alone = interval([few])
    assert high - low == pytest.approx((alone[1] - alone[0]) / 2, rel=0.05), "the chance of the few, half as heavy"


@pytest.mark.parametrize(("few", "least"), [(10, 245), (40, 235), (400, 274)])
def test_seeds_that_were_asked_little_are_not_taken_for_certain(few: int, least: int) -> None:
    """300 made-up studies of two seeds; 95% of 300 is 285, with a standard deviation of 3.8. With some dozens of
    questions a bootstrap is narrow, and not more than that."""
    rng = np.random.default_rng(0)
    ways = [0.9, 0.02, 0.03, 0.05]
    drawn = [[Paired(*map(int, rng.multinomial(n, ways))) for n in (4_000, few)] for _ in range(300)]
    assert sum(low <= 0.01 <= high for low, high in map(interval, drawn)) >= least


def test_ways_that_nothing_told_apart_are_not_surely_the_same() -> None:
    low, high = interval([Paired(900, 0, 0, 100)])
    assert low == -high
    assert (1 - high) ** 1_000 == pytest.approx(0.025)
    several = interval([Paired(900, 0, 0, 60), Paired(40, 0, 0, 0)])
    assert (1 - 2 * several[1]) ** 40 == pytest.approx(0.025), "by the seed that was asked least, of two"
    beside = interval([Paired(900, 10, 10, 40), Paired(40, 0, 0, 0)])
    assert beside[1] > several[1] > -beside[0] - several[1]
    assert interval([Paired(3, 0, 0, 0)])[1] > 0.5


@pytest.mark.parametrize(("first", "second"), [(0.02, 0.02), (0.10, 0.12), (0.01, 0.03)])
def test_intervals_hold_the_truth_as_often_as_they_say(first: float, second: float) -> None:
    """400 made-up studies of 1,000 questions; 95% of 400 is 380, with a standard deviation of 4.4."""
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(1_000, [0.8 - first, first, second, 0.2 - second], 400)
    held = [low <= second - first <= high for low, high in (interval([Paired(*map(int, cells))]) for cells in drawn)]
    assert sum(held) >= 365
