"""The benchmark of several GPUs, with two processes on a CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerances import STEP_TOLERANCES

from lragent.bench import launches, scaling
from lragent.bench.scaling_problem import word_tokenizer, write_conversations
from lragent.bench.traces import ROLES, sized_trace, trace_tokens
from lragent.chat import Renderer
from lragent.errors import LRAgentError, UserError
from lragent.trajectories import read_row


def test_a_conversation_has_the_tokens_that_were_asked_for(tmp_path: Path) -> None:
    write_conversations(tmp_path / "rows.jsonl", 2, 1_000, vocabulary=300)
    renderer = Renderer(word_tokenizer(300))
    trace = sized_trace(1_000)
    texts = set()
    for line in (tmp_path / "rows.jsonl").read_text().splitlines():
        rendered = read_row(json.loads(line), ROLES, source="").render(renderer)
        assert len(rendered.token_ids) == trace_tokens(trace)
        assert sum(author is not None for author in rendered.authors) == sum(step.answer for step in trace)
        assert 0 <= max(rendered.token_ids) < 300
        texts.add(line)
    assert len(texts) == 2
    assert abs(trace_tokens(trace) - 1_000) <= 4


def rows(*losses: float, scale: float = 1.0) -> list[dict[str, Any]]:
    return [
        {"step": at, "loss": loss, "grad_norm": scale * loss, "tokens": 100, "targets": 10, "tokens_per_second": 50.0,
         "seconds": 3.0 * at + 5, "mfu": 0.3}
        for at, loss in enumerate(losses, start=1)
    ]  # fmt: skip


def test_rates_are_of_all_the_time_after_the_warmup() -> None:
    done = launches.Launched(rows(4, 3, 2), {"engine": "DDP", "memory_gib": [1.0], "seconds": 14.5}, wall_s=40.0)
    found = scaling.measured(done, warmup=1)
    assert found["tokens_s"] == pytest.approx(200 / 6)
    assert found["step_s"] == pytest.approx(3)
    assert found["mfu"] == pytest.approx(0.3 * 4 / 6), "of the time between steps nothing is computed"
    assert (found["first_step_s"], found["around_s"]) == (8.0, 25.5)


def test_other_losses_or_a_scaled_gradient_are_not_the_same() -> None:
    one = rows(4.0, 3.0)
    assert scaling.compared(rows(4.0, 3.0001), one, 2e-4)["same"]
    assert not scaling.compared(rows(4.0, 3.01), one, 2e-4)["same"]
    assert not scaling.compared(rows(4.0, 3.0, scale=2.0), one, 2e-4)["same"]
    with pytest.raises(LRAgentError, match="other tokens"):
        scaling.compared(rows(4.0), one, 2e-4)


def test_tolerances_are_those_of_the_tests() -> None:
    dtypes = {"float32": torch.float32, "bf16": torch.bfloat16}
    assert {dtypes[name]: same for name, same in scaling.SAME.items()} == STEP_TOLERANCES


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--strategies", "one,zero4"], "--strategies: 'zero4'"),
        (["--objectives", "both"], "--objectives: 'both'"),
        (["--resume", "ddp"], "--resume: 'ddp' is not two"),
        (["--strategies", "ddp", "--resume", "ddp:one"], "put `one` among --strategies"),
        (["--steps", "3"], "--steps: must be more than --warmup"),
        (["--batches", "0"], "--batches"),
    ],
)
def test_what_cannot_be_measured_is_refused(words: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        scaling.parse(words)


def test_no_config_is_invented(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="gpu_3_ddp"):
        launches.accelerate_config("ddp", 3, tmp_path)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the processes that are launched."""
    monkeypatch.setenv("LRAGENT_CACHE", str(tmp_path / "cache"))


SMALL = ["--shape", "tiny", "--objectives", "shared", "--tokens", "1000", "--conversations", "4", "--steps", "4",
         "--warmup", "1", "--tokens-per-batch", "1000"]  # fmt: skip


@pytest.mark.slow
def test_two_processes_are_measured_and_go_on_as_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--strategies", "one,zero2", "--resume", "zero2:one", "--results", str(tmp_path), "lr=1e-2"]
    assert scaling.main([*SMALL, *words]) == 0
    numbers = json.loads(capsys.readouterr().out.splitlines()[-1])
    (saved,) = tmp_path.glob("scaling-*.json")
    assert json.loads(saved.read_text())["rows"] == numbers["rows"]
    one, two = numbers["rows"]
    assert [row["engine"] for row in (one, two)] == ["one process", "DeepSpeed ZeRO-2"]
    assert len(two["memory_gib"]) == 2
    assert min(two["memory_gib"]) > 0
    assert two["tokens"] == one["tokens"] == 3 * 2 * 1_000
    assert two["efficiency"] == pytest.approx(two["tokens_s"] / (2 * one["tokens_s"]))
    (resumed,) = numbers["resumed"]
    assert 2 <= resumed["stopped_after"] < 4
    assert resumed["processes"] == 1
    for row in (two, resumed):
        assert row["same"]
        assert row["b_off"] < 1e-3, "moments that were lost would change every step after"


@pytest.mark.slow
def test_a_run_that_fails_or_does_not_end_is_told_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def numbers(*words: str) -> Any:
        assert scaling.main([*SMALL, "--strategies", "one", "--no-save", "--work", str(tmp_path), *words]) == 1
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    (failed,) = numbers("rank=0")["rows"]
    assert "`rank` is 0" in failed["failed"]
    (failed,) = numbers("--run-limit", "1")["rows"]
    assert "did not end within 1 s" in failed["failed"]


def test_no_run_begins_after_the_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert scaling.main([*SMALL, "--time-limit", "0", "--no-save", "--work", str(tmp_path)]) == 0
    numbers = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert not numbers["rows"]
    assert numbers["left_out"] == ["one shared", "ddp shared", "zero2 shared", "zero3 shared"]
