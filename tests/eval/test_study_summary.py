"""What records say: shares and differences over seeds, on the questions that both were asked."""

from __future__ import annotations

from typing import Any

import pytest

from lragent.errors import UserError
from lragent.eval.intervals import wilson
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
    assert exact.interval() == pytest.approx(wilson(0.65 * 40 / 7, 40 / 7)), "the harmonic mean of 5 and 2, twice"
    found = study.from_exact("shared", "full_shared")
    assert found is not None
    assert (found.total.both, found.total.only_first, found.total.only_second, found.total.neither) == (1, 2, 1, 1)
    assert found.points == pytest.approx(100 * (-1 / 4 + 0) / 2)
    low, high = found.interval()
    assert low <= -12.5 <= high
    assert found.widest() >= (high - low) / 2
    assert study.from_best("shared", "non_shared") is None, "it is the best itself"


def test_nothing_is_counted_twice_or_across_levels() -> None:
    with pytest.raises(UserError, match="two of seed 0, shared, non_shared"):
        Study([cell("non_shared", "11"), cell("non_shared", "11")])
    with pytest.raises(UserError, match="levels demo and hard"):
        Study([cell("non_shared", "11"), cell("full_shared", "11", level="hard")])
    assert Study([{"kind": "machine"}]).cells == {}
