"""Checkpoints: nothing is lost when a process dies, the disk is full or a file is damaged."""

from __future__ import annotations

import errno
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_loop import metrics, rows, settings
from tiny import save_tiny

from lragent.errors import UserError
from lragent.pack import read_pack
from lragent.train import checkpoints as module
from lragent.train import run
from lragent.train.checkpoints import (
    MARKER,
    ROWS,
    RUN,
    STATE,
    Checkpoint,
    Checkpoints,
    CheckpointWarning,
    Progress,
    check_plan,
    read_checkpoint,
)
from lragent.train.loop import train


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(8)))
    return path


def made(done: int) -> Checkpoint:
    torch.manual_seed(done)
    state = {"m.shared_A": torch.randn(3, 5), "exp_avg:m.shared_A": torch.randn(3, 5)}
    progress = Progress(0, done, done, (1.5, 2.5), {"losses": {"shared": {"all": 0.1}}}, {"seed": 3, "roles": ["a"]})
    return Checkpoint(progress, state, [{"step": 1, "loss": 0.1 + 0.2}, {"step": 1, "eval": {}}])


def same(one: Checkpoint, other: Checkpoint) -> bool:
    return (
        one.progress == other.progress
        and list(one.rows) == list(other.rows)
        and one.state.keys() == other.state.keys()
        and all(torch.equal(value, other.state[name]) for name, value in one.state.items())
    )


def test_what_is_written_is_read_and_only_the_newest_are_kept(tmp_path: Path) -> None:
    place = Checkpoints(tmp_path / "p", keep=2)
    assert place.newest() is None
    for done in (3, 12, 100):
        place.write(made(done))
    assert [path.name for path in place.folders()] == ["step-00000100", "step-00000012"]
    found = place.newest()
    assert found is not None
    assert same(found, made(100))
    place.write(made(100))  # again, as after a resume
    assert same(read_checkpoint(place.folders()[0]), made(100))
    assert len(place.folders()) == 2


def in_a_child(work: Callable[[], None]) -> int:
    """Run `work` in a forked process; returns its exit status."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def dying_at(call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process ends, without any clean-up, at its `call`-th step towards the disk."""
    calls = 0

    def deadly(real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == call:
                os._exit(9)
            return real(*args, **kwargs)

        return wrapped

    for name in ("fsync", "rename", "replace", "mkdir", "chmod", "rmdir", "unlink"):
        monkeypatch.setattr(os, name, deadly(getattr(os, name)))
    for name in ("write_text", "open"):
        monkeypatch.setattr(Path, name, deadly(getattr(Path, name)))
    monkeypatch.setattr(module.safetensors.torch, "save_file", deadly(module.safetensors.torch.save_file))


def test_a_process_that_dies_anywhere_in_a_save_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Checkpoints(tmp_path / "p", keep=1)
    place.write(made(1))
    for call in range(1, 200):
        with monkeypatch.context() as patched:

            def work(call: int = call, patched: pytest.MonkeyPatch = patched) -> None:
                dying_at(call, patched)
                place.write(made(2))

            status = in_a_child(work)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CheckpointWarning)
            found = place.newest()
        assert found is not None
        assert same(found, made(1)) or same(found, made(2)), f"at step {call} towards the disk"
        place.sweep()
        assert all(path.name.startswith("step-") for path in place.place.iterdir())
        if status == 0:
            break
    assert call > 10, "the save must have been cut off at many places"
    assert same(found, made(2))


@pytest.mark.parametrize("name", [STATE, RUN, ROWS, MARKER])
@pytest.mark.parametrize("how", ["cut off", "changed", "gone", "empty"])
def test_a_damaged_checkpoint_is_passed_over(name: str, how: str, tmp_path: Path) -> None:
    place = Checkpoints(tmp_path / "p", keep=2)
    place.write(made(1))
    path = place.write(made(2)) / name
    content = path.read_bytes()
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes({"cut off": content[:-3], "empty": b"", "changed": content[:40] + b"\x01" + content[41:]}[how])
    with pytest.warns(CheckpointWarning, match="step-00000002"):
        found = place.newest()
    assert found is not None
    assert same(found, made(1))
    with pytest.raises(UserError, match="step-00000002"):
        read_checkpoint(place.folders()[0])


def test_where_no_checkpoint_is_whole_nothing_begins_anew_behind_ones_back(tmp_path: Path) -> None:
    place = Checkpoints(tmp_path / "p", keep=2)
    (place.write(made(1)) / STATE).unlink()
    with pytest.warns(CheckpointWarning), pytest.raises(UserError, match=r"no checkpoint in .*p is whole"):
        place.newest()


def test_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "VERSION", 99)
    folder = Checkpoints(tmp_path / "p", keep=2).write(made(1))
    monkeypatch.undo()
    with pytest.raises(UserError, match="another version"):
        read_checkpoint(folder)


def test_a_plan_that_differs_is_named() -> None:
    check_plan({"lr": 1.0, "roles": ["a"]}, {"lr": 1.0, "roles": ["a"]})
    with pytest.raises(UserError, match=r"`lr` 2.0, this one has 1.0"):
        check_plan({"lr": 1.0}, {"lr": 2.0})
    with pytest.raises(UserError, match="`new`"):
        check_plan({"new": 1}, {})


# -- whole runs ----------------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


def killed_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    step = run.PhaseRun._step

    def stepped(self: run.PhaseRun, *args: Any) -> dict[str, Any]:
        row = step(self, *args)
        if row["step"] == steps:
            raise Killed
        return row

    monkeypatch.setattr(run.PhaseRun, "_step", stepped)


def plain(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without what the machine's speed decides."""
    return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second", "memory_gib")} for row in rows]


@pytest.mark.parametrize(
    "options",
    [
        {"objective": "mixed", "dropout": 0.2},
        {"objective": "per_role", "tying": "sequential", "max_steps": 6},
        {"objective": "shared", "batches_per_step": 3, "tokens_per_batch": 80},
    ],
    ids=["mixed", "sequential", "accumulated"],
)
@pytest.mark.parametrize("after", [5, 8])
def test_a_run_that_was_killed_goes_on_as_if_nothing_had_been(
    after: int, options: dict[str, Any], data: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: losses, gradients, evaluations and the pack. In `sequential`, step 8 lies in the second part."""
    held_out = data.parent / "eval.jsonl"
    held_out.write_text(json.dumps(rows(9)[-1]) + "\n")
    common: dict[str, Any] = {"max_steps": 10, "save_every": 2, "eval_data": held_out, "eval_every": 3} | options
    whole = train(settings(data, model, "whole", **common))
    with monkeypatch.context() as patched:
        killed_after(after, patched)
        with pytest.raises(Killed):
            train(settings(data, model, "resumed", **common))
    assert not (data.parent / "resumed").exists()
    with pytest.raises(UserError, match=r"resumed\.partial holds an interrupted run: go on with `--resume auto`"):
        train(settings(data, model, "resumed", **common))
    resumed = train(settings(data, model, "resumed", **common), resume=True)
    assert whole is not None
    assert resumed is not None
    assert plain(metrics(resumed["out"])) == plain(metrics(whole["out"]))
    assert Path(resumed["pack"]).read_bytes() == Path(whole["pack"]).read_bytes()
    assert resumed["eval_before"] == whole["eval_before"]
    assert resumed["train_loss_first"] == whole["train_loss_first"]
    assert not (data.parent / "resumed.partial").exists()


def test_other_settings_or_data_do_not_go_on(data: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        killed_after(3, patched)
        with pytest.raises(Killed):
            train(settings(data, model, save_every=1))
    with pytest.raises(UserError, match=r"`lr` 0\.02, this one has 0\.5"):
        train(settings(data, model, save_every=1, lr=0.5), resume=True)
    kept = data.read_text()
    data.write_text(kept.replace("one two", "two"))
    with pytest.raises(UserError, match="`data`"):
        train(settings(data, model), resume=True)
    data.write_text(kept)
    assert train(settings(data, model, save_every=7, keep=1), resume=True) is not None, "these may differ"


def test_resume_without_anything_to_go_on_from_begins(data: Path, model: Path) -> None:
    assert train(settings(data, model, max_steps=2), resume=True) is not None


def test_a_full_disk_costs_checkpoints_and_not_the_run(
    data: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(settings(data, model, "whole", max_steps=6))
    save = module.safetensors.torch.save_file

    def full(*args: Any) -> None:
        save(*args)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(module.safetensors.torch, "save_file", full)
        with pytest.warns(CheckpointWarning, match=r"no checkpoint of step 2: .*No space left"):
            run_on = train(settings(data, model, "full", max_steps=6, save_every=2))
    assert whole is not None
    assert run_on is not None
    got, want = read_pack(run_on["pack"]), read_pack(whole["pack"])
    assert all(torch.equal(got.shared_a[path], want.shared_a[path]) for path in want.module_paths)
    assert not [path for path in data.parent.iterdir() if path.name.startswith(".tmp")]


def test_a_loss_that_breaks_later_keeps_the_last_good_checkpoint(
    data: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = run.PhaseRun._step

    def poisoned(self: run.PhaseRun, *args: Any) -> dict[str, Any]:
        if self.past.done == 4:
            with torch.no_grad():
                next(iter(self.strategy.built.modules.values())).shared_a.fill_(float("nan"))
        return step(self, *args)

    monkeypatch.setattr(run.PhaseRun, "_step", poisoned)
    with pytest.raises(UserError, match=r"step 5: the loss is nan .*last good checkpoint is .*step-00000004"):
        train(settings(data, model, save_every=2))
    monkeypatch.undo()
    assert train(settings(data, model, save_every=2), resume=True) is not None
