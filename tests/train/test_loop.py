"""Whole training runs on a tiny model: what is learnt, what is written, and what stops a run."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from tiny import save_tiny

from lragent.errors import UserError
from lragent.models import load_model
from lragent.pack import read_pack
from lragent.train import distributed, loop, run, schedule
from lragent.train.export import RunResult
from lragent.train.loop import train
from lragent.train.schedule import learning_rate
from lragent.train.settings import TrainSettings
from lragent.train.train_roles import main

ROLES = ("plan", "action", "reflect")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny")


def says(name: str, text: str) -> dict[str, Any]:
    return {"role": "assistant", "name": name, "content": text}


def rows(count: int) -> list[dict[str, Any]]:
    """Each role always says the same, so that a few steps can learn it."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"the question {i}"},
                says("plan", "and then search" + " on" * (i % 3)),
                says("action", "one"),
                {"role": "tool", "content": f"out {i * i}"},
                says("action", "one two"),
                says("reflect", "right" if i % 2 else "right on"),
            ]
        }
        for i in range(count)
    ]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(8)))
    return path


def settings(data: Path, model: Path, name: str = "out", **options: Any) -> TrainSettings:
    plain: dict[str, Any] = {
        "model": str(model), "dtype": "float32", "rank": 4, "alpha": 8, "dropout": 0.0, "lr": 2e-2, "max_steps": 12,
        "tokens_per_batch": 300,
    }  # fmt: skip
    return TrainSettings(data=data, out=data.parent / name, **(plain | options))


def metrics(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("objective", ["shared", "per_role", "mixed"])
def test_a_run_learns_and_leaves_everything_behind(objective: str, data: Path, model: Path) -> None:
    held_out = data.parent / "eval.jsonl"
    held_out.write_text(json.dumps(rows(9)[-1]) + "\n")
    summary = train(settings(data, model, objective=objective, eval_data=held_out, eval_every=5))
    assert summary is not None
    assert summary["train_loss_last"] < 0.7 * summary["train_loss_first"]
    kinds = {"shared": ["shared"], "per_role": ["per_role"], "mixed": ["shared", "per_role"]}[objective]
    assert list(summary["eval_before"]) == kinds
    for kind in kinds:
        assert set(summary["eval_before"][kind]) == {*ROLES, "all"}
        for role in ROLES:
            assert summary["eval_after"][kind][role] < summary["eval_before"][kind][role]
    out = Path(summary["out"])
    assert {path.name for path in out.iterdir()} == {
        "pack.safetensors", "peft", "README.md", "metrics.jsonl", "losses.png",
    }  # fmt: skip
    assert {path.name for path in (out / "peft").iterdir()} == set(ROLES)
    assert not [path for path in data.parent.iterdir() if path.name.startswith(".tmp")]
    steps = [row for row in metrics(summary["out"]) if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 13))
    assert all(math.isfinite(row["grad_norm"]) and row["tokens"] > row["targets"] > 0 for row in steps)
    assert [row["step"] for row in metrics(summary["out"]) if "eval" in row] == [0, 5, 10, 12]
    assert summary["tokens"] == sum(row["tokens"] for row in steps)
    pack = read_pack(summary["pack"])
    assert (pack.objective, pack.prefix_writer, pack.role_names) == (objective, "base", ROLES)


def test_equal_seeds_give_equal_runs_and_others_do_not(data: Path, model: Path) -> None:
    packs = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        summary = train(settings(data, model, name, seed=seed, dropout=0.1, max_steps=3))
        assert summary is not None
        packs.append(Path(summary["pack"]).read_bytes())
    assert packs[0] == packs[1]
    assert packs[0] != packs[2]


def test_accumulated_batches_are_one_big_batch(data: Path, model: Path) -> None:
    """Batches of unequal numbers of targets, so that a mean of means would differ."""
    big = train(settings(data, model, "big", objective="shared", max_steps=2, tokens_per_batch=10_000))
    small = train(
        settings(data, model, "small", objective="shared", max_steps=2, tokens_per_batch=1, batches_per_step=8)
    )
    assert big is not None
    assert small is not None
    for one, other in zip(metrics(big["out"]), metrics(small["out"]), strict=True):
        assert one["targets"] == other["targets"], "both steps must meet all eight trajectories"
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    a, b = read_pack(big["pack"]), read_pack(small["pack"])
    for path in a.module_paths:
        torch.testing.assert_close(a.role_b[path], b.role_b[path], atol=2e-5, rtol=1e-3)


def test_the_clock_ends_a_run_with_the_learning_rate_down(
    data: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Clock:
        now = 0.0

        @classmethod
        def monotonic(cls) -> float:
            cls.now += 0.3
            return cls.now

    for module in (run, schedule):
        monkeypatch.setattr(module, "time", Clock)
    summary = train(settings(data, model, max_steps=1000, max_minutes=0.5))
    assert summary is not None
    assert 5 < summary["steps"] < 30
    rates = [row["lr"] for row in metrics(summary["out"])]
    assert max(rates) > 0.9 * 2e-2
    assert rates[-1] < 0.05 * 2e-2
    assert rates[3:] == sorted(rates[3:], reverse=True)


def test_the_learning_rate_rises_and_falls() -> None:
    assert learning_rate(0.05, 1.0, 0.1) == pytest.approx(0.5)
    assert learning_rate(0.1, 1.0, 0.1) == pytest.approx(1.0)
    assert learning_rate(0.55, 1.0, 0.1) == pytest.approx(0.5)
    assert learning_rate(1.0, 1.0, 0.1) == pytest.approx(0.0)
    assert learning_rate(0.0, 1.0, 0.0) == pytest.approx(1.0)


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_nothing(
    data: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **options: Any) -> Any:
        base = load_model(*args, **options)
        with torch.no_grad():
            base.model.layers[1].mlp.down_proj.weight[0, 0] = float("inf")
        return base

    monkeypatch.setattr(distributed, "load_model", broken)
    with pytest.raises(UserError, match=r"step 1: .*nan.*learning rate.*train\.jsonl:\d.*lower `lr`"):
        train(settings(data, model))
    assert sorted(path.name for path in data.parent.iterdir()) == ["train.jsonl"]


def test_only_the_adapters_learn(data: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    prepare = Accelerator.prepare

    def spy(self: Accelerator, *args: Any) -> Any:
        module, optimizer = prepare(self, *args)
        seen["before"] = {name: p.detach().clone() for name, p in module.named_parameters() if not p.requires_grad}
        seen["module"], seen["optimizer"] = module, optimizer
        return module, optimizer

    monkeypatch.setattr(Accelerator, "prepare", spy)
    train(settings(data, model, max_steps=2))
    assert sum(len(group["params"]) for group in seen["optimizer"].param_groups) == 4 * (1 + len(ROLES))
    for name, parameter in seen["module"].named_parameters():
        if name in seen["before"]:
            assert torch.equal(parameter, seen["before"][name]), name


def test_wandb_is_offline_and_in_the_output_folder(data: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, Any]] = []

    class Tracker:
        def log(self, row: dict[str, Any], step: int) -> None:
            calls.append(("log", (step, row)))

        def finish(self, exit_code: int) -> None:
            calls.append(("finish", exit_code))

    wandb = pytest.importorskip("wandb")
    monkeypatch.setattr(wandb, "init", lambda **kwargs: calls.append(("init", kwargs)) or Tracker())
    train(settings(data, model, max_steps=2, tracking="wandb", project="mine"))
    assert [name for name, _ in calls] == ["init", "log", "log", "finish"]
    assert calls[0][1]["project"] == "mine"
    assert calls[0][1]["config"]["rank"] == 4
    assert calls[1][1][0] == 1
    assert calls[1][1][1]["loss"] > 0
    assert calls[-1] == ("finish", 0)


def log_records(content: bytes) -> Iterator[bytes]:
    """The records of a file of wandb's: a header of 7 bytes, then LevelDB's log format."""
    at, parts = 7, b""
    while at + 7 <= len(content):
        if 32_768 - at % 32_768 < 7:  # what is left of a block is filled up
            at += 32_768 - at % 32_768
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield parts
            parts = b""


@pytest.mark.slow
def test_wandb_writes_an_offline_run_for_real(data: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read back with wandb's own reader: losses of every step, and the settings."""
    wandb = pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    summary = train(settings(data, model, max_steps=3, tracking="wandb", project="mine"))
    assert summary is not None
    (written,) = Path(summary["out"]).glob("wandb/offline-run-*/run-*.wandb")
    losses, project = [], None
    for found in log_records(written.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(found)
        if record.WhichOneof("record_type") == "run":
            project = record.run.project
        if record.WhichOneof("record_type") == "history":
            values = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
            losses.append(float(values["loss"]))
    assert project == "mine"
    assert losses == pytest.approx([row["loss"] for row in metrics(summary["out"])])
    assert wandb.run is None, "the run was ended"


def test_without_matplotlib_a_run_ends_well(data: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: Any) -> None:
        raise ImportError("matplotlib")

    monkeypatch.setattr(loop, "draw", missing)
    with pytest.warns(loop.CurvesWarning, match="matplotlib is not installed"):
        summary = train(settings(data, model, max_steps=2))
    assert summary is not None
    assert "losses.png" not in Path(summary["out"], "README.md").read_text()


# -- the command ---------------------------------------------------------------------------------------------------


def words(data: Path, model: Path, *more: str) -> list[str]:
    return [f"data={data}", f"out={data.parent / 'out'}", f"model={model}", "dtype=float32", "max_steps=2", *more]


def test_the_last_line_is_the_summary(data: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(data, model, "rank=2")) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["steps"] == 2
    assert {"train_loss_first", "train_loss_last", "tokens", "seconds", "pack", "peft", "out"} <= set(summary)
    assert Path(summary["pack"]).is_file()
    assert set(RunResult.__dataclass_fields__) <= set(summary)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["rnak=3"], "`rank`"),
        (["rank=0"], "`rank`"),
        (["dtype=fp8"], "`dtype`"),
        (["data=nowhere.jsonl"], "nowhere.jsonl"),
        (["roles=[plan, action]"], "'reflect'"),
        (["roles=[plan, action, reflect, judge]"], "'judge' authors nothing"),
        (["targets=[qq]"], "qq"),
        (["layers=[9]"], "layer 9"),
        (["max_length=20"], "train.jsonl:1"),
        (["model=./no-such-model"], "no-such-model"),
        (["eval_every=2"], "eval_data"),
        (["tying=sequential"], "`objective: per_role`, not `mixed`"),
        (["tying=sequential", "objective=per_role", "roles=[plan]"], "at least two roles"),
        (["batches_per_step=0"], "`batches_per_step`"),
        (["quantize=nf4"], "needs a CUDA GPU"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(
    more: list[str], says: str, data: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(data, model, *more)) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert says in error
    assert "\n" not in error
    assert sorted(path.name for path in data.parent.iterdir()) == ["train.jsonl"]


def test_a_row_that_nobody_authored_is_named(data: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with data.open("a") as file:
        file.write(json.dumps({"messages": [{"role": "user", "content": "x"}]}) + "\n")
    assert main(words(data, model)) == 2
    assert "train.jsonl:9" in capsys.readouterr().err


def test_an_output_folder_in_use_is_left_alone(data: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (data.parent / "out").mkdir()
    (data.parent / "out" / "mine.txt").write_text("keep")
    assert main(words(data, model)) == 2
    assert "out is there already" in capsys.readouterr().err
    assert [path.name for path in (data.parent / "out").iterdir()] == ["mine.txt"]
