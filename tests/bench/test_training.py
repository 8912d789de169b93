"""The benchmarks of training, on tiny models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny import save_tiny

from lragent.bench import learning, training
from lragent.train.compiling import compile_elementwise
from lragent.train.data import RoleViews

TOKENS = 1_100


def test_trajectories_and_their_views_learn_the_same_turns() -> None:
    one = training.trajectory(TOKENS, 300, seed=1)
    assert abs(len(one) - TOKENS) <= 4
    authored = int((one.authors > 0).sum())
    views = training.step_views(one)
    assert len(views) == 17
    assert sum(int((view.authors > 0).sum()) for view in views) == authored
    assert sum(int((view.authors > 0).sum()) for view in RoleViews([one])) == authored
    assert int(one.roles[0]) == 0, "the base writes what comes before the first turn"
    shared, per_role, per_step = (
        sum(batch.input_ids.numel() for batch in training.batches([one], way, 4_000)) for way in training.WAYS
    )
    assert shared == len(one)
    assert 2 * shared < per_role < 3.1 * shared
    assert per_step > 5 * shared


def test_the_benchmark_of_steps_runs(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--shape", "tiny", "--tokens", "1000", "--trajectories", "1", "--repeats", "1", "--no-save"]
    assert training.main(words) == 0
    numbers = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["way"] for row in numbers["rows"]] == list(training.WAYS)
    assert all(row["tokens_s"] > 0 for row in numbers["rows"])


def test_flops_are_what_the_matrices_say() -> None:
    made = training.Trainee.of("tiny", torch.device("cpu"), torch.float32, compiled=False, recompute=False)
    layer = 64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 96  # q and o, k and v, the MLP
    attention = 6 * 2 * 4 * 16 * (10**2 + 20**2)
    assert made.flops.of([(0, 10), (10, 30)], targets=5) == 4 * 2 * layer * 30 + 4 * 64 * 300 * 5 + attention


@pytest.mark.slow
def test_compiled_parts_compute_the_same() -> None:
    plain = training.Trainee.of("tiny", torch.device("cpu"), torch.float32, compiled=False, recompute=False)
    compiled = training.Trainee.of("tiny", torch.device("cpu"), torch.float32, compiled=True, recompute=False)
    for seed in (1, 2):
        batch = training.pack([training.trajectory(TOKENS + 100 * seed, 300, seed)])
        for one_pass in (True, False):
            one, other = plain.step(batch, one_pass), compiled.step(batch, one_pass)
            assert one == pytest.approx(other, rel=1e-4)


def test_what_cannot_be_compiled_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **options: object) -> object:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch._dynamo.config, "suppress_errors", False)
    made = training.Trainee.of("tiny", torch.device("cpu"), torch.float32, compiled=False, recompute=False)
    batch = training.pack([training.trajectory(TOKENS, 300, 1)])
    plain = made.step(batch, True)
    other = training.Trainee.of("tiny", torch.device("cpu"), torch.float32, compiled=False, recompute=False)
    compile_elementwise(other.built)
    monkeypatch.setattr(torch._inductor.compile_fx, "compile_fx", broken)
    assert other.step(batch, True) == pytest.approx(plain, rel=1e-4)


@pytest.mark.slow
def test_the_experiment_runs_goes_on_and_is_merged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_tiny(tmp_path / "tiny")
    words = [
        "--model", str(model), "--level", "demo", "--examples", "12", "--held-out", "3", "--generated", "1",
        "--no-save", "--epochs", "1", "--tokens-per-batch", "2000", "--dtype", "float32",
    ]  # fmt: skip
    one, other = tmp_path / "1.jsonl", tmp_path / "2.jsonl"
    assert learning.main([*words, "--seeds", "0", "--records", str(one), "--regimes", "shared,apart"]) == 0
    before = one.read_text()
    assert learning.main([*words, "--seeds", "0", "--records", str(one), "--regimes", "shared,apart,healed"]) == 0
    assert one.read_text().startswith(before), "finished cells are not run again"
    assert learning.main([*words, "--seeds", "1", "--records", str(other), "--regimes", "shared,sequential"]) == 0
    capsys.readouterr()
    assert learning.main(["--merge", str(one), str(other), "--no-save"]) == 0
    rows = {row["regime"]: row for row in json.loads(capsys.readouterr().out.splitlines()[-1])}
    assert rows["shared"]["seeds"] == [0, 1]
    assert set(rows) == {"shared", "apart", "healed", "sequential"}
    for row in rows.values():
        for way in ("predicted", "generated"):
            for mode in ("non_shared", "base_lr_shared"):
                low, high = row[f"{way} {mode}"]["interval"]
                assert 0 <= low <= row[f"{way} {mode}"]["share"] <= high <= 100
    assert rows["healed"]["tokens"] <= 0.1 * rows["apart"]["tokens"] + 2000
