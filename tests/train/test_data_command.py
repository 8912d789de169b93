"""`lragent data check` and `lragent data convert`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_loop import rows, says
from tiny import save_tiny

from lragent.cli.main import main
from lragent.train.check import balance
from lragent.trajectories import read_row

ROLES = ("plan", "action", "reflect")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny")


def test_check_lists_all_errors_and_counts_the_rest(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "d.jsonl"
    bad = [
        "{not json",
        json.dumps({"messages": [{"role": "user", "content": "x"}, says("judge", "no")]}),
        json.dumps({"messages": [{"role": "user", "content": "x"}]}),
        json.dumps({"prompt": "a"}),
    ]
    path.write_text("\n".join([*map(json.dumps, rows(3)), *bad, json.dumps(rows(4)[3])]) + "\n")
    assert main(["data", "check", str(path), "--model", str(model), "--max-length", "150"]) == 2
    out = capsys.readouterr().out
    for line, part in (
        (4, "is not a line of JSON"),
        (5, "'judge'"),
        (6, "no role authors anything"),
        (7, "completion"),
    ):
        assert f"{path}:{line}: " in out
        assert part in out
    assert "4 rows to learn from, 4 that are wrong" in out
    assert "reflect: " in out
    assert " are cut off" in out


def test_check_of_good_data_is_content_and_points_at_silent_roles(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "d.jsonl"
    long = {"messages": [{"role": "user", "content": "x"}, says("plan", "and then " * 60), says("action", "a")]}
    path.write_text(json.dumps(long) + "\n")
    assert main(["data", "check", str(path), "--model", str(model)]) == 0
    out = capsys.readouterr().out
    assert "warning: the role 'reflect' authors nothing" in out
    assert "times fewer tokens than 'plan'" in out


def test_the_balance_of_roles_is_one_line() -> None:
    assert balance(["plan", "action"], [3000, 1000]) == "authored tokens: plan 3,000 (75%), action 1,000 (25%)"
    assert balance(["plan", "action"], [3000, 100]).endswith("; action has 30 times fewer than the most")


def test_a_hundred_errors_are_counted_and_not_all_shown(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text("x\n" * 100)
    assert main(["data", "check", str(path), "--model", str(model)]) == 2
    out = capsys.readouterr().out
    assert out.count("is not a line of JSON") == 50
    assert "and 50 more" in out


PROMPT = """Use tools. For example, Finish[Richard Nixon]
Question: Where was the founder born?

Thought 1: Need the founder.
Action 1: Bing Search[founder of Zenvor].
Observation 1: Zenvor was founded by Milbek.
It is old.
Thought 2: Hmm.
Action 2: None
Observation 2: Invalid action.
Thought 3: Milbek it is.
Action 3: Finish[Milbek]
Observation 3: Please reflect your answer.
Thought 4: That is a person, not a place.
Action 4: Reflect[wrong]
Observation 4: Answer is INCORRECT
Thought 5: Need the birthplace.
Action 5: Retrieve[Milbek]
Observation 5: Milbek was born in Kelrin [north].
Thought 6: So Kelrin.
Action 6: Finish[Kelrin]
Observation 6: Please reflect your answer.
Thought 7: It answers the question.
Action 7: Reflect[right]
Observation 7: Answer is CORRECT
Thought 8: None.
Action 8: None.
"""


def autoact(**changes: Any) -> dict[str, Any]:
    plain = {"question": "Where was the founder born?", "prompt": PROMPT, "correct": True, "halted": False}
    return plain | {"error": False, "reward": 1.0, "answer": "Kelrin"} | changes


def converted(tmp_path: Path, given: list[Any], *more: str) -> list[dict[str, Any]]:
    source, out = tmp_path / "a.json", tmp_path / "out.jsonl"
    source.write_text(json.dumps(given))
    assert main(["data", "convert", "--from", "autoact", str(source), "-o", str(out), *more]) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_a_trajectory_of_autoact_by_hand(tmp_path: Path) -> None:
    (row,) = converted(tmp_path, [autoact()])
    assert [(m["role"], m.get("name"), m["content"]) for m in row["messages"][1:]] == [
        ("user", None, "Where was the founder born?"),
        ("assistant", "plan", "Need the founder. BingSearch"),
        ("assistant", "action", "founder of Zenvor"),
        ("tool", None, "Zenvor was founded by Milbek.\nIt is old."),
        ("assistant", "plan", "Milbek it is. Finish"),
        ("assistant", "action", "Milbek"),
        ("assistant", "reflect", "That is a person, not a place. wrong"),
        ("assistant", "plan", "Need the birthplace. Retrieve"),
        ("assistant", "action", "Milbek"),
        ("tool", None, "Milbek was born in Kelrin [north]."),
        ("assistant", "plan", "So Kelrin. Finish"),
        ("assistant", "action", "Kelrin"),
        ("assistant", "reflect", "It answers the question. right"),
    ]
    text = json.dumps(row)
    assert "CORRECT" not in text, "the environment's verdict may be known to nobody"
    assert "Please reflect" not in text
    read_row(row, ROLES, source="x")


def test_turns_may_be_split_as_in_the_paper(tmp_path: Path) -> None:
    (row,) = converted(tmp_path, [autoact()], "--split-turns")
    said = [(m["name"], m["content"]) for m in row["messages"] if m["role"] == "assistant"]
    assert said[:3] == [("plan", "Need the founder."), ("plan", "BingSearch"), ("action", "founder of Zenvor")]
    assert said[-2:] == [("reflect", "It answers the question."), ("reflect", "right")]


def test_what_is_dropped_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [
        autoact(),
        autoact(halted=True),
        autoact(error=True),
        autoact(correct=False),
        autoact(prompt=PROMPT.split("Thought 3")[0]),
        {"no": "row"},
    ]
    assert len(converted(tmp_path, given, "--only", "correct")) == 1
    out = capsys.readouterr().out
    assert "1 trajectories of 6 rows" in out
    for reason in ("halted", "marked as an error", "not correct", "no answer that is judged", "no `question`"):
        assert f"1 rows dropped: {reason}" in out
    assert "2 of 8 steps cut out: the action is not Tool[argument]" in out


@pytest.mark.parametrize("content", ["", "[1, 2", "nothing"])
def test_files_of_another_kind_are_refused(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.json").write_text(content)
    assert main(["data", "convert", str(tmp_path / "a.json"), "-o", str(tmp_path / "o.jsonl")]) == 2
    assert str(tmp_path / "a.json") in capsys.readouterr().err
    assert not (tmp_path / "o.jsonl").exists()


def test_a_row_without_a_step_is_dropped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(converted(tmp_path, [autoact(), autoact(prompt="Question: nobody said anything")])) == 1
    assert "1 rows dropped: no answer that is judged" in capsys.readouterr().out
