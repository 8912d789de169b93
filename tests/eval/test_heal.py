"""Adapters that were trained apart: healing, its report, and next steps by the engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_adapter_set, save_tiny, tiny_model

from lragent.adapter_set import AdapterSet
from lragent.cli.main import main
from lragent.errors import UserError
from lragent.eval.heal import HealSettings
from lragent.eval.intervals import wilson
from lragent.eval.next_step import NextSteps, next_steps
from lragent.pack import read_pack, write_pack
from lragent.peft_io import adapter_set_from_peft
from lragent.serve import Engine
from lragent.serve.engine.types import Chunk
from lragent.train.evaluation import EvalScores

ROLES = ("plan", "action", "reflect")


def says(name: str, text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "name": name, "content": text, **more}


def row(number: int) -> dict[str, Any]:
    said = [says("plan", "and then search"), says("action", "one"), {"role": "tool", "content": f"out {number}"}]
    return {"messages": [{"role": "user", "content": f"question {number}"}, *said, says("reflect", "right on")]}


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, three roles of A's of their own, and data in which each role says always the same."""
    folder = tmp_path_factory.mktemp("given")
    save_tiny(folder / "tiny")
    stacked = make_adapter_set(tiny_model(), ROLES, rank=2, tied=False)
    write_pack(folder / "apart.safetensors", stacked)
    (folder / "d.jsonl").write_text("".join(json.dumps(row(number)) + "\n" for number in range(40)))
    return folder


def words(given: Path, out: Path, *more: str) -> list[str]:
    plain = ["heal", str(given / "apart.safetensors"), "--data", str(given / "d.jsonl"), "-o", str(out)]
    return [*plain, "--model", str(given / "tiny"), "--tokens-per-batch", "300", "--generated", "2", *more]


def test_healing_writes_a_tied_pack_that_learnt_something(
    given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """These roles predict no turn at all, so there is no gap: here it is made one that nothing closes."""
    monkeypatch.setattr(EvalScores, "accuracy", lambda self, kind, role="all": 2.0 if kind == "per_role" else 0.0)
    assert main(words(given, tmp_path / "healed", "--lr", "0.02", "--epochs", "3")) == 0
    out = capsys.readouterr().out
    assert "The gap is NOT closed" in out
    assert "base_lr_shared" in out
    assert "lragent serve --roles" in out
    before, healed = read_pack(given / "apart.safetensors"), read_pack(tmp_path / "healed" / "pack.safetensors")
    assert (before.form, healed.form, healed.objective) == ("stacked", "tied", "shared")
    path = healed.module_paths[0]
    assert healed.rank(path) == before.rank(path) == 6
    for old, new in zip(before.roles, healed.roles, strict=True):
        assert new.scaling(path) == pytest.approx(old.scaling(path))
    report = json.loads((tmp_path / "healed" / "report.json").read_text())
    losses = [report[when]["base_lr_shared"]["all"]["loss"] for when in ("before", "after")]
    assert losses[1] < losses[0]
    assert report["tokens"] > 0
    assert report["before"]["non_shared"]["plan"]["turns"] == 4, "every tenth of forty rows is held out"
    assert set(report["generated"]) == {"before", "after"}
    folders = adapter_set_from_peft({role: tmp_path / "healed" / "peft" / role for role in ROLES})
    assert all(torch.equal(folders.shared_a[p], healed.shared_a[p]) for p in healed.module_paths)


def test_a_gap_that_is_none_is_closed_at_once(given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(given, tmp_path / "healed", "--tolerance", "100", "--generated", "0")) == 0
    out = capsys.readouterr().out
    assert "The gap is closed; 0 tokens" in out
    before, healed = (read_pack(p) for p in (given / "apart.safetensors", tmp_path / "healed" / "pack.safetensors"))
    _compute_the_same(before, healed)


def _compute_the_same(one: AdapterSet, other: AdapterSet) -> None:
    for path in one.module_paths:
        torch.testing.assert_close(
            other.scaled_b(path) @ other.shared_a[path], one.scaled_b(path) @ one.shared_a[path], atol=1e-6, rtol=1e-5
        )


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--lr", "0"], "lr: must be above 0"),
        (["--epochs", "0"], "epochs: must be at least 1"),
        (["--max-tokens", "0"], "max_tokens: must be at least 1"),
        (["--data", "none.jsonl"], "none.jsonl"),
    ],
)
def test_bad_input_is_one_sentence(
    more: list[str], says: str, given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(given, tmp_path / "healed", *more)) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "healed").exists()


def test_settings_are_checked() -> None:
    with pytest.raises(UserError, match="tolerance"):
        HealSettings(Path("p"), Path("d"), Path("o"), tolerance=0)


# -- next steps ----------------------------------------------------------------------------------------------------


class Parrot:
    """An engine that knows what to say to some prompts."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def generate_many(self, asked: list[Any], **options: Any) -> list[Chunk]:
        self.asked += asked
        assert options["temperature"] == 0
        return [Chunk("one" if role == "action" else "wrong", finish_reason="stop") for role, _ in asked]


def test_every_learnt_turn_is_asked_for_after_what_stands_before_it() -> None:
    parrot = Parrot()
    mistaken = {"messages": [*row(0)["messages"][:-1], says("reflect", "no", weight=0), says("reflect", "right on")]}
    found = next_steps(parrot, [row(1)["messages"], mistaken["messages"]])  # type: ignore[arg-type]
    assert found == NextSteps({"plan": 0, "action": 2, "reflect": 0}, {"plan": 2, "action": 2, "reflect": 2})
    assert [role for role, _ in parrot.asked] == ["plan", "action", "reflect"] * 2
    assert parrot.asked[5][1] == mistaken["messages"][:-1]
    assert found.accuracy == pytest.approx(1 / 3)
    assert (found + found).total["plan"] == 4


def test_the_engine_s_next_steps_are_what_it_generates(given: Path) -> None:
    with Engine(str(given / "tiny"), given / "apart.safetensors", dtype="float32", device="cpu") as engine:
        text = engine.generate("plan", row(1)["messages"][:1], max_tokens=5, temperature=0.0).text
        right = [row(1)["messages"][0], says("plan", text)]
        found = next_steps(engine, [right, [row(2)["messages"][0], says("plan", "never said")]], max_tokens=5)
    assert (found.right["plan"], found.total["plan"]) == (1, 2)


def test_intervals_hold_the_share_and_stay_within_bounds() -> None:
    for right, total in ((0, 5), (5, 5), (98, 100), (1, 3)):
        low, high = wilson(right, total)
        assert 0 <= low <= right / total <= high <= 1
    assert wilson(50, 100) == pytest.approx((0.404, 0.596), abs=1e-3)
    with pytest.raises(ValueError, match="no share"):
        wilson(1, 0)
