"""What records say: shares and differences over seeds, on the questions that both were asked."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lragent.errors import UserError
from lragent.eval.study.summary import Study


def cell(mode: str, right: str, **changes: Any) -> dict[str, Any]:
    asked = len(right)
    plain = {"kind": "answers", "level": "demo", "seed": 0, "regime": "shared", "mode": mode, "asked": asked}
    return plain | {"right": right, "endings": {"accepted": asked - 1, "context": 1}, "mean": {"turns": 7.0}} | changes


def test_modes_are_paired_by_question_within_each_seed() -> None:
    study = Study([
        cell("non_shared", "11011"), cell("full_shared", "1010"),
        cell("non_shared", "01", seed=1, mean={"turns": 9.0}), cell("full_shared", "0", seed=1),
    ])  # fmt: skip
    exact = study.cells["shared", "non_shared"]
    assert exact.shares == {0: 4 / 5, 1: 1 / 2}
    assert exact.share == pytest.approx(0.65), "both trainings count alike"
    assert exact.out_of_function == pytest.approx((1 / 5 + 1 / 2) / 2)
    assert exact.mean("turns") == 8
    found = study.from_exact("shared", "full_shared")
    assert found is not None
    assert (found.total.both, found.total.only_first, found.total.only_second, found.total.neither) == (1, 2, 1, 1)
    assert found.points == pytest.approx(100 * (-1 / 4 + 0) / 2)
    low, high = found.interval()
    assert low <= -12.5 <= high
    assert found.widest() >= (high - low) / 2
    assert study.from_best("shared", "non_shared") is None, "it is the best itself"


@pytest.mark.parametrize(
    ("asked", "shares"), [((4_000, 4_000), (0.95, 0.95)), ((100, 2_000), (0.5, 0.97)), ((40, 900), (0.99, 0.3))]
)
def test_intervals_of_means_hold_the_truth_as_often_as_they_say(
    asked: tuple[int, ...], shares: tuple[float, ...]
) -> None:
    """400 made-up cells of two seeds; 95% of 400 is 380, with a standard deviation of 4.4."""
    rng, held = np.random.default_rng(0), 0
    for _ in range(400):
        made = [
            cell("non_shared", "".join("01"[int(hit)] for hit in rng.random(count) < share), seed=seed)
            for seed, (count, share) in enumerate(zip(asked, shares, strict=True))
        ]
        low, high = Study(made).cells["shared", "non_shared"].interval()
        held += low <= sum(shares) / 2 <= high
    assert held >= 364


def test_the_best_is_sought_among_those_of_most_seeds() -> None:
    easy = cell("non_shared", "1111", regime="mixed")
    both = [cell("non_shared", "1110", seed=seed, regime="per_role") for seed in (0, 1)]
    best = Study([easy, *both]).best
    assert best is not None
    assert best.regime == "per_role", "seed 0 may be easy"


def test_nothing_is_counted_twice_or_across_levels() -> None:
    with pytest.raises(UserError, match="two of seed 0, shared, non_shared"):
        Study([cell("non_shared", "11"), cell("non_shared", "11")])
    with pytest.raises(UserError, match="levels demo and hard"):
        Study([cell("non_shared", "11"), cell("full_shared", "11", level="hard")])
    with pytest.raises(UserError, match="older form"):
        Study([cell("non_shared", "11-1")])
    assert Study([{"kind": "machine"}]).cells == {}
