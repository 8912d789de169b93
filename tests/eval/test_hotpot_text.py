"""`lragent eval text`: cells measured on a tiny model, not twice, and the report's section."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from autoact_rows import about
from tiny import make_adapter_set, save_tiny, tiny_model

from lragent.cli.main import main
from lragent.errors import UserError
from lragent.eval.agent import Limits
from lragent.eval.engine_client import engine_complete
from lragent.eval.examine import examine
from lragent.eval.hotpot import measure as measuring
from lragent.eval.hotpot.measure import TextSettings, measure
from lragent.eval.hotpot.section import section
from lragent.eval.hotpot.split import read_held_out
from lragent.eval.records import read_records
from lragent.modes import SharingMode
from lragent.pack import write_pack
from lragent.serve import Engine

MODES = [str(mode) for mode in SharingMode]
ROLES = ("plan", "action", "reflect")


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a pack of three roles, and a folder made of ten rows."""
    folder = tmp_path_factory.mktemp("given")
    save_tiny(folder / "tiny")
    write_pack(folder / "pack.safetensors", make_adapter_set(tiny_model(), ROLES))
    (folder / "rows.json").write_text(json.dumps([about(f"Ombel{number}", str(number)) for number in range(10)]))
    assert main(["eval", "text", "split", str(folder / "rows.json"), "-o", str(folder / "data")]) == 0
    return folder


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model would ramble on to the limits."""
    monkeypatch.setattr(measuring, "LIMITS", Limits(iterations=2, max_tokens=dict.fromkeys(ROLES, 8)))
    monkeypatch.setattr(measuring, "LONGEST_TURN", 8)


def words(given: Path, out: Path, *more: str) -> list[str]:
    plain = ["eval", "text", "run", "--data", str(given / "data"), "--roles", str(given / "pack.safetensors")]
    return [*plain, "--model", str(given / "tiny"), "--label", "random", "-o", str(out), *more]


def test_split_says_what_it_wrote(given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "text", "split", str(given / "rows.json"), "-o", str(tmp_path / "d"), "--seed", "1"]) == 0
    out = capsys.readouterr().out
    assert "train.jsonl: 8 trajectories to learn from" in out
    assert "held_out.jsonl: 2 held-out trajectories" in out
    assert "passages.jsonl: 10 passages" in out
    assert (tmp_path / "d" / "held_out.jsonl").read_bytes() != (given / "data" / "held_out.jsonl").read_bytes()


@pytest.mark.usefixtures("short")
def test_every_mode_is_measured_once(
    given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "records.jsonl"
    served = []

    def engine(*rest: Any, sharing: SharingMode, **options: Any) -> Engine:
        served.append(str(sharing))
        return Engine(*rest, sharing=sharing, **options)

    monkeypatch.setattr(measuring, "Engine", engine)
    assert main(words(given, out, "--modes", "non_shared,base_lr_shared", "--questions", "1")) == 0
    first = read_records([out])
    assert main(words(given, out)) == 0
    records = read_records([out])
    assert records[: len(first)] == first, "finished cells stay as they are"
    assert "random, seed 0, non_shared: is in" in capsys.readouterr().out
    assert served == ["non_shared", "base_lr_shared", "full_shared", "base_shared"]
    assert [r["mode"] for r in records if r["kind"] == "text-answers"] == served
    gold = read_held_out(given / "data")
    turns = [(mode, message["name"]) for mode in MODES for t in gold.trajectories for message in t if "name" in message]
    for mode in MODES:
        own = [record for record in records if record["mode"] == mode]
        found = sorted((record["kind"], record.get("role", "")) for record in own)
        each = [(kind, role) for kind in ("text-loss", "text-steps") for role in sorted(ROLES)]
        assert found == [("machine", ""), ("text-answers", ""), *each]
        for record in own:
            if record["kind"] == "text-loss":
                assert 2 < record["loss"] < 20
            elif record["kind"] == "text-steps":
                assert 0 <= record["right"] <= record["turns"] == turns.count((mode, record["role"]))
    losses = {r["mode"]: r["loss"] for r in records if r["kind"] == "text-loss" and r["role"] == "action"}
    assert len(set(losses.values())) == 4, "each mode has a loss of its own"
    answers = {r["mode"]: r["questions"] for r in records if r["kind"] == "text-answers"}
    assert [len(answers[mode]) for mode in MODES] == [1, 2, 2, 1]
    assert set(answers["full_shared"][0]) == {"id", "right", "f1", "steps", "ending"}
    assert answers["full_shared"][0]["ending"] == "iterations"

    def never(*rest: Any, **more: Any) -> None:
        raise AssertionError("nothing is left to be measured")

    monkeypatch.setattr(measuring, "Engine", never)
    assert main(words(given, out)) == 0
    assert read_records([out]) == records
    with pytest.raises(AssertionError, match="nothing is left"):
        main(words(given, out, "--seed", "1"))


def test_a_cell_that_fails_leaves_the_others(
    given: Path, tmp_path: Path, short: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "records.jsonl"
    answers: Callable[..., Any] = measuring._answers
    calls = []

    def failing(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return answers(*arguments)

    monkeypatch.setattr(measuring, "_answers", failing)
    assert main(words(given, out, "--questions", "1")) == 130
    assert {record["mode"] for record in read_records([out])} == {"non_shared"}


def test_the_loop_ends_on_the_real_engine_where_the_context_is_full(given: Path) -> None:
    held_out = read_held_out(given / "data")
    options: dict[str, Any] = {"max_model_len": 700, "max_tokens_in_cache": 4_096}
    with Engine(str(given / "tiny"), given / "pack.safetensors", **options) as engine:
        done = examine(held_out, held_out.questions, engine_complete(engine), Limits(iterations=99), workers=2)
    assert [str(episode.ending) for episode in done.episodes] == ["context", "context"]
    replies = [step.reply for episode in done.episodes for step in episode.steps if step.reply is not None]
    assert all(reply.generated_tokens and reply.ttft_s and reply.total_s for reply in replies)
    assert sum(reply.tokens_reused or 0 for reply in replies) > 0


@pytest.mark.parametrize(
    ("more", "part"),
    [
        (("--modes", "none"), "--modes: 'none' is none of non_shared, "),
        (("--modes", ","), "modes: is empty"),
        (("--questions", "0"), "questions: must be at least 1, not 0"),
        (("--label", ""), "label: is empty"),
    ],
)
def test_what_cannot_be_measured_is_said(
    more: tuple[str, ...], part: str, given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(given, tmp_path / "records.jsonl", *more)) == 2
    assert part in capsys.readouterr().err


def test_packs_and_files_that_do_not_fit_are_refused_before_anything_runs(given: Path, tmp_path: Path) -> None:
    write_pack(tmp_path / "two.safetensors", make_adapter_set(tiny_model(), ROLES[:2]))

    def refused(match: str, roles: Path, out: Path) -> None:
        with pytest.raises(UserError, match=match):
            measure(TextSettings(given / "data", roles, "x", out, model=str(given / "tiny")), print)

    refused("has no role reflect", tmp_path / "two.safetensors", tmp_path / "r.jsonl")
    taken = {"kind": "machine", "label": "x", "seed": 0, "mode": "non_shared", "pack": "of another"}
    (tmp_path / "taken.jsonl").write_text(json.dumps(taken) + "\n")
    refused("another pack did as x, seed 0", given / "pack.safetensors", tmp_path / "taken.jsonl")
    refused("its folder does not exist", given / "pack.safetensors", tmp_path / "no" / "r.jsonl")
    (tmp_path / "bad.jsonl").write_text('{"kind": "text-loss"}\n')
    refused("bad.jsonl:1: is no record", given / "pack.safetensors", tmp_path / "bad.jsonl")


def cell(label: str, seed: int, mode: str, right: int) -> list[dict[str, Any]]:
    head = {"label": label, "seed": seed, "mode": mode}
    question = {"id": "q", "right": True, "f1": 1.0, "steps": 3, "ending": "accepted"}
    wrong = {"id": "p", "right": False, "f1": 0.5, "steps": 10, "ending": "iterations"}
    return [
        {"kind": "text-loss", **head, "role": "plan", "loss": 1.0 + seed, "tokens": 300},
        {"kind": "text-loss", **head, "role": "action", "loss": 4.0, "tokens": 100},
        {"kind": "text-steps", **head, "role": "plan", "right": right, "turns": 50},
        {"kind": "text-steps", **head, "role": "action", "right": 0, "turns": 50},
        {"kind": "text-answers", **head, "questions": [question, wrong]},
    ]


def test_the_section_puts_seeds_together_and_roles_beside_all(tmp_path: Path) -> None:
    records = [
        *cell("mixed", 0, "non_shared", 40), *cell("mixed", 1, "non_shared", 30), *cell("shared", 0, "full_shared", 5),
        {"kind": "another", "label": "mixed", "seed": 0, "mode": "non_shared"},
    ]  # fmt: skip
    text = section(records, tmp_path)
    lines = text.splitlines()
    assert "| trained | role | `non_shared` | `full_shared` |" in lines
    assert "| mixed | plan | 1.500 | - |" in lines
    assert "| mixed | all | 2.125 | - |" in lines
    assert "| mixed | plan | 70.0 (60.4 to 78.1) | - |" in lines
    assert "| mixed | all | 35.0 (28.7 to 41.8) | - |" in lines
    assert "| shared | plan | - | 10.0 (4.3 to 21.4) |" in lines
    assert "| mixed | `non_shared` | 50.0 (15.0 to 85.0) | 75.0 | 6.5 | 2 | 2 | 0 | 4 | - |" in lines
    assert lines[-1].startswith("| shared | `full_shared` |")
    assert lines[-1].endswith("| 1 | 1 | 0 | 2 | - |"), "nothing to be compared with"
    assert not any(line.startswith("| mixed | reflect") for line in lines)
    assert "2 seeds are put together" in text
    assert "asked 2 held-out questions" in text
    assert section(records[-1:], tmp_path) == ""
    assert list(tmp_path.iterdir()) == []


def test_the_section_compares_modes_question_by_question(tmp_path: Path) -> None:
    def answers(seed: int, mode: str, **right: bool) -> dict[str, Any]:
        questions = [{"id": name, "right": is_right, "f1": 0.0, "steps": 1, "ending": "accepted"}
                     for name, is_right in right.items()]  # fmt: skip
        return {"kind": "text-answers", "label": "x", "seed": seed, "mode": mode, "questions": questions}

    records = [
        answers(0, "non_shared", a=True, b=True, c=False, d=False),
        answers(1, "non_shared", a=False),
        answers(0, "full_shared", a=False, b=False, c=True, d=False, e=True),
        answers(1, "full_shared", a=False),
    ]
    last = section(records, tmp_path).splitlines()[-1]
    assert last.endswith(" | 6 | +1 -2: -12.5 (-98.8 to +73.8) |"), "a seed of four, one of one: it tells little"
