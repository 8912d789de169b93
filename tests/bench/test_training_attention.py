"""The benchmark's yardstick is right, and it reports no speed for what is not."""

from __future__ import annotations

import functools

import pytest
import torch
from tolerances import assert_close

from lragent.bench import training_attention as bench
from lragent.bench.attention_problem import Problem, exact
from lragent.errors import UserError
from lragent.kernels.attention import lora_attention
from lragent.kernels.packed import PackedLayout, packed_attention


def problem() -> Problem:
    return Problem.of((5, 9), 3, torch.device("cpu"), torch.float32, (4, 2, 16))


def dense(given: Problem) -> bench.Contender:
    """Attention of the house in plain torch, as a contender."""
    layout = PackedLayout.of(given.spans, torch.device("cpu"))

    def call() -> list[torch.Tensor]:
        return [packed_attention(*given.inputs, given.up, given.roles, layout, scale=0.25)]

    return bench.Contender(
        "dense", given.inputs, [given.grad], call, lambda results, gradients: (results, gradients),
        lambda given, known: [given.add_up(known.out, known.low_out)],
    )  # fmt: skip


def test_the_yardstick_is_attention_of_each_trajectory_alone() -> None:
    given = problem()
    known = exact(given)
    plain = [
        lora_attention(*(x[:, a:b] for x in (given.query, given.key, given.value)), scale=0.25) for a, b in given.spans
    ]
    assert_close(known.out, torch.cat(plain), torch.float32)
    gradients = torch.autograd.grad(torch.cat(plain), given.inputs[:3], given.grad)
    for mine, theirs in zip(known.plain, gradients, strict=False):
        assert_close(mine, theirs, torch.float32)
    assert dense(given).error(given, known) < 1e-5


@pytest.mark.parametrize("kind", ["cuDNN", "flash"])
@pytest.mark.parametrize("widened", [True, False])
def test_torchs_own_attention_passes(kind: str, widened: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With whatever backend a CPU has."""
    monkeypatch.setattr(bench, "_only", lambda kind: bench.nullcontext())
    given = problem()
    assert bench.torchs(given, kind, widened).error(given, exact(given)) < 1e-5


def test_no_speed_for_a_wrong_result_and_none_lost_by_a_failing_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.Contender, "time", lambda self, gradients, rounds: self.times[gradients].append(2.0))
    given = problem()

    def wrong() -> bench.Contender:
        contender = dense(given)
        contender.grads = [given.grad * 1.05]
        return contender

    def broken() -> bench.Contender:
        raise RuntimeError("no such\nbackend")

    makers = [("wrong", wrong), ("broken", broken), ("right", functools.partial(dense, given))]
    rows = bench.race(given, makers, 2)
    assert "no speed" in rows[0]["failed"]
    assert rows[1] == {"contender": "broken", "failed": "RuntimeError: no such backend"}
    assert all("forward_ms" not in row for row in rows[:2])
    assert rows[2]["forward_ms"] == rows[2]["both_ms"] == 2.0
    assert rows[2]["forward_tflops"] == round(2 * 4 * 16 * (25 + 81) / 2e-3 / 1e12, 1)


def test_it_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="CUDA"):
        bench.main([])
