"""`lragent eval caches` from files to a file."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from tiny import make_adapter_set, save_tiny, tiny_model

from lragent.cli.main import main
from lragent.pack import write_pack

ROLES = ("plan", "action", "reflect")


def says(name: str, text: str) -> dict[str, Any]:
    return {"role": "assistant", "name": name, "content": text}


def row(number: int) -> dict[str, Any]:
    said = [says("plan", "and then search"), says("action", "one"), {"role": "tool", "content": f"out {number}"}]
    return {"messages": [{"role": "user", "content": f"question {number}"}, *said, says("reflect", "right on")]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a pack and data."""
    folder = tmp_path_factory.mktemp("given")
    save_tiny(folder / "tiny")
    adapters = make_adapter_set(tiny_model(), ROLES)
    write_pack(folder / "pack.safetensors", dataclasses.replace(adapters, objective="mixed", prefix_writer="base"))
    (folder / "d.jsonl").write_text("".join(json.dumps(row(number)) + "\n" for number in range(4)))
    return folder


def words(folder: Path, out: Path, *more: str) -> list[str]:
    plain = ["eval", "caches", "--roles", str(folder / "pack.safetensors"), "--data", str(folder / "d.jsonl")]
    return [*plain, "-o", str(out), "--model", str(folder / "tiny"), "--device", "cpu", *more]


@pytest.mark.filterwarnings("ignore::lragent.adapter_set.UnknownBaseWarning")
def test_it_writes_records_of_both_kinds(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "records.json"
    assert main(words(folder, out, "--trajectories", "3")) == 0
    about, *records = json.loads(out.read_text())
    assert (about["kind"], about["label"], about["trajectories"]) == ("caches", "mixed", 3)
    assert {record["kind"] for record in records} == {"similarity", "divergence"}
    assert {record["label"] for record in records} == {"mixed"}
    (whole,) = (
        record
        for record in records
        if record["kind"] == "divergence"
        and (record["mode"], record["role"], record["step"]) == ("base_shared", "all", None)
    )
    assert whole["trajectories"] == 3
    # The speaker writes its own prefix in base_shared: its first turn is exact. In base_lr_shared the base wrote it.
    first = {record["mode"]: record["kl"] for record in records if record.get("step") == 0}
    assert first["base_shared"] < 1e-5 < 1e-4 < first["base_lr_shared"]
    printed = capsys.readouterr().out
    assert "mixed, 3 trajectories" in printed
    assert f"base_shared: KL {whole['kl']:.3g} nats" in printed


@pytest.mark.filterwarnings("ignore::lragent.adapter_set.UnknownBaseWarning")
def test_a_label_is_taken_and_all_rows_where_there_are_fewer(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "records.json"
    assert main(words(folder, out, "--label", "ours")) == 0
    about, *records = json.loads(out.read_text())
    assert about["trajectories"] == 4
    assert {record["label"] for record in records} == {"ours"}


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--trajectories", "0"], "--trajectories: must be at least 1"),
        (["--device", "cuda:99"], "--device: cuda:99 is not here; use cpu"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_what_is_wrong_is_named(
    folder: Path, tmp_path: Path, more: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "records.json"
    assert main(words(folder, out, *more)) != 0
    assert told in capsys.readouterr().err
    assert not out.exists()
