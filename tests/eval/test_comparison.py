"""The table of one team's answers in several modes."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from test_answers import answer

from lragent.eval.agent import Ending
from lragent.eval.answers import AnswerFile
from lragent.eval.comparison import show


def write(path: Path, right: Callable[[int], bool], count: int) -> Path:
    with AnswerFile(path) as file:
        for number in range(count):
            file.add(answer(number, right=right(number), ending=Ending.ACCEPTED if number else Ending.CONTEXT))
    return path


def shown(files: dict[str, Path]) -> list[list[str]]:
    """The cells of the table's rows, in 80 columns."""
    out = io.StringIO()
    show(files, Console(file=out, width=80, highlight=False))
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.getvalue().splitlines() if "│" in line]


def test_modes_are_compared_on_what_all_were_asked(tmp_path: Path) -> None:
    one = write(tmp_path / "one.jsonl", lambda number: number < 8, 12)
    two = write(tmp_path / "two.jsonl", lambda number: number < 3, 10)
    rows = {row[0]: row[1:] for row in shown({"non_shared": one, "full_shared": two})}
    assert [cell.split(" ")[0] for cell in rows["right %"]] == ["80.0", "30.0"]
    assert rows["difference"][0] == ""
    assert rows["difference"][1].startswith("-50.0 (-80.0 to -20.0")
    assert rows["p (McNemar)"] == ["", "0.062"]
    assert rows["no answer %"] == ["10.0", "10.0"]
    assert rows["tokens reused"] == ["700", "700"]


def test_answers_behind_an_open_question_are_not_counted(tmp_path: Path) -> None:
    """Broken off while a question was open that takes long: those that were quick look better than the team is."""
    path = tmp_path / "a.jsonl"
    with AnswerFile(path) as file:
        for number, right in ((0, False), (2, True), (3, True)):
            file.add(answer(number, right=right))
    out = io.StringIO()
    show({"a": path}, Console(file=out, width=80))
    assert "2 answers are not counted yet, behind a question that is open" in " ".join(out.getvalue().split())
    rows = {row[0]: row[1:] for row in shown({"a": path})}
    assert rows["right %"] == ["0.0 (0.0 to 79.3)"]


def test_all_right_is_not_surely_right(tmp_path: Path) -> None:
    """A bootstrap of three right answers would say: from 100 to 100."""
    same = [write(tmp_path / f"{name}.jsonl", lambda number: True, 3) for name in "ab"]
    rows = {row[0]: row[1:] for row in shown({"a": same[0], "b": same[1]})}
    assert rows["right %"] == ["100.0 (43.8 to 100.0)"] * 2
    assert rows["difference"] == ["", "+0.0 (-70.8 to +70.8)"]
    assert rows["p (McNemar)"] == ["", "1"]


def test_without_a_common_question_there_is_no_table(tmp_path: Path) -> None:
    assert shown({"a": write(tmp_path / "a.jsonl", bool, 0), "b": write(tmp_path / "b.jsonl", bool, 2)}) == []
