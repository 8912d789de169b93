"""The kernels' benchmark reports no speed for a wrong result."""

from __future__ import annotations

import pytest
import torch
from rich.console import Console

from lragent.bench import __main__ as bench
from lragent.bench.cached_problem import CachedProblem
from lragent.bench.kernels import Bench
from lragent.bench.roofline import Ceilings
from lragent.errors import LRAgentError
from lragent.kernels.cached import cached_attention_reference

CPU = torch.device("cpu")


def problem(new: list[int]) -> CachedProblem:
    return CachedProblem.random(new, [30] * len(new), CPU, rank_v=4, rank_k=4, dtype=torch.float32)


def exact(of: CachedProblem) -> torch.Tensor:
    return cached_attention_reference(of.query, of.caches[-1], of.batch, of.readers, scale=of.scale)


def test_a_right_result_has_no_error() -> None:
    of = problem([2, 0, 3])
    assert of.error(exact(of)) < 1e-6


@pytest.mark.parametrize("row", [0, 1, 4])
def test_a_wrong_row_is_noticed(row: int) -> None:
    of = problem([2, 0, 3])
    out = exact(of)
    out[row] *= 1.2
    assert of.error(out) > 0.01
    out[row] = float("nan")
    assert not of.error(out) <= 0.01


def test_of_a_long_chunk_both_ends_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lragent.bench.cached_problem.CHECKED", 2)
    of = problem([20])
    out = exact(of)
    for row, noticed in ((0, True), (1, True), (10, False), (18, True), (19, True)):
        wrong = out.clone()
        wrong[row] += 1
        assert (of.error(wrong) > 0.01) == noticed


def test_work_is_counted() -> None:
    of = CachedProblem.random([1, 3], [100, 50], CPU, rank_v=8)
    assert of.bytes == 150 * (2 * 8 * 128 + 8) * 2
    assert of.operations == 4 * 32 * 128 * (100 + 48 + 49 + 50)


@pytest.mark.parametrize("error", [0.02, float("nan")])
def test_no_speed_for_a_wrong_result(error: float) -> None:
    rows = Bench(CPU, Console(quiet=True), Ceilings(copy=3e12, products=8e14))
    with pytest.raises(LRAgentError, match="few tokens, this: the result is off by"):
        rows.add("few tokens", "this", 10.0, error=error)
    assert not rows.rows
    rows.add("few tokens", "this", 10.0, moved=15e6, error=0.004)
    assert rows.rows[0].share == pytest.approx(0.5)


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main(["kernels"]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err
