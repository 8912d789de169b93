"""The page of recorded results: its numbers follow from the records, and what no record is about is left out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lragent.cli.main import main
from lragent.errors import UserError
from lragent.eval.agent import Ending
from lragent.eval.answers import Answer, AnswerFile
from lragent.eval.records import read_records
from lragent.eval.report.page import write_report
from lragent.eval.report.recorded import merged
from lragent.eval.run_folder import RunFolder
from lragent.eval.study.folder import StudyFolder
from lragent.eval.study.plan import StudyPlan
from lragent.eval.study.regimes import Training
from lragent.eval.study.work import run_study

ROOT = Path(__file__).parents[2]
MEANS = {"iterations": 2.0, "turns": 6.0, "context": 300.0, "generated": 40.0, "reused": 500.0}
RIGHT = {
    ("mixed", "non_shared"): ("1111111100", "1111100000"),
    ("mixed", "full_shared"): ("1000000000", "1000000000"),
    ("mixed", "base_lr_shared"): ("1111111011", "1111111110"),
    ("apart", "non_shared"): ("111111111", "111111111"),
    ("apart", "base_lr_shared"): ("1111100000", "0000000000"),
    ("healed", "base_lr_shared"): ("1111111110", "1111111110"),
}
"""By regime and mode, of two seeds."""


def answers(regime: str, mode: str, seed: int, right: str, **more: Any) -> dict[str, Any]:
    asked = len(right)
    cell = {"kind": "answers", "level": "demo", "seed": seed, "regime": regime, "mode": mode, "asked": asked}
    found = {
        "kinds": {"yes_no": [right[:4].count("1"), 4], "two_hop": [right[4:].count("1"), asked - 4]},
        "endings": {"accepted": asked - 1, "context": 1},
        "mean": {**MEANS, "computed": 900.0 if mode == "non_shared" else 300.0, "seconds": 1.0, "ttft_s": 0.5},
    }
    return cell | {"right": right} | found | more


def study() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [
        {"kind": "machine", "machine": "A machine", "python": "3.11.1", "torch": "2", "transformers": "5", "peft": "1"}
        | {"threads": 1, "commit": commit}
        for commit in ("abc", "def")
    ]
    plan = {"level": "demo", "train": None, "test": 10, "training": {"model": None, "rank": 8}, "iterations": 45}
    found.append({"kind": "study", **plan})
    for regime, tokens in (("mixed", 2_000_000), ("apart", 3_000), ("healed", 240_000)):
        for seed in (0, 1):
            taken = {"tokens": tokens + 20_000 * seed, "steps": 1, "seconds": 1.0}
            taken |= {"closed": seed == 1} if regime == "healed" else {}
            found.append({"kind": "training", "level": "demo", "seed": seed, "regime": regime, **taken})
    for (regime, mode), of_seeds in RIGHT.items():
        found += [answers(regime, mode, seed, right) for seed, right in enumerate(of_seeds)]
    return found


def speed() -> dict[str, Any]:
    cell = answers("", "base_lr_shared", 0, "1100")
    return cell | {"kind": "speed", "label": "my-team", "workers": [1, 16], "machines": ["A machine"]}


def keep(records: Sequence[dict[str, Any]], path: Path) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def rows(text: str, *first: str) -> list[list[str]]:
    """The rows of all tables that begin with these cells."""
    lines = [line for line in text.splitlines() if line.startswith(f"| {' | '.join(first)} |")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.fixture
def page(tmp_path: Path) -> str:
    file = keep([*study(), speed()], tmp_path / "records.jsonl")
    assert main(["eval", "report", str(file), "-o", str(tmp_path / "docs" / "sharing.md")]) == 0
    return (tmp_path / "docs" / "sharing.md").read_text()


def test_right_answers_and_what_training_took(page: str) -> None:
    right, spread = rows(page, "`mixed`")[:2]
    assert right[1:3] == ["half as `shared`, half as `per_role`, one A learnt by all", "2.01 M"]
    assert [cell.split()[0] for cell in right[3:]] == ["65.0", "10.0", "90.0"], "13, 2 and 18 of 20"
    assert right[3] == "65.0 (43.8 to 81.6)"
    assert spread[1:] == ["80.0, 50.0 (10.0)", "10.0, 10.0 (10.0)", "90.0, 90.0 (10.0)"]
    assert rows(page, "`apart`")[0][2] == "13,000"
    assert rows(page, "`healed`")[0][2:4] == ["+ 0.25 M", "-"], "after apart; in no exact mode"


def test_what_not_every_seed_was_asked_is_marked(page: str, tmp_path: Path) -> None:
    assert "° marks" not in page
    assert "before sharing in 1 of 2 seeds, else" in page
    cells = [answers("mixed", "non_shared", seed, "1110") for seed in (0, 1)]
    write_report([keep([*cells, answers("mixed", "full_shared", 1, "1000")], tmp_path / "r.jsonl")], tmp_path / "p.md")
    text = (tmp_path / "p.md").read_text()
    right, by_seed = rows(text, "`mixed`")[:2]
    assert "° marks what was not asked in every seed" in text
    assert [cell[-1] for cell in right[3:]] == [")", "°"]
    assert [cell.split(" (")[0] for cell in by_seed[1:]] == ["75.0, 75.0", "-, 25.0"]
    assert rows(text, "`mixed`", "`full_shared`")[0][4] == "-, -50.0"
    assert "- `mixed` in `full_shared`: -50.0 points against the best `non_shared` (by seed -, -50.0)" in text
    assert "Healing" not in text


def test_differences_on_the_same_questions(page: str) -> None:
    changes = page.split("### What each mode changes")[1].split("###")[0]
    (full,), (shared,) = (rows(changes, "`mixed`", f"`{mode}`") for mode in ("full_shared", "base_lr_shared"))
    assert full[2].startswith("-55.0 (")
    assert full[3:6] == ["0.00098", "-70.0, -40.0", "20"], "11 lost: 2 / 2^11"
    assert shared[2].startswith("+25.0 (")
    assert shared[3:6] == ["0.12", "+10.0, +40.0", "20"], "1 lost, 6 won: 2 (1 + 7) / 2^7"
    assert float(shared[6]) == pytest.approx(30, abs=10), "of ten questions"


def test_against_the_best_without_sharing(page: str) -> None:
    assert "`apart` answers most: 100.0" in page
    best = page.split("### Against the best")[1].split("###")[0]
    (mixed,), (apart,) = (rows(best, f"`{regime}` in `base_lr_shared`") for regime in ("mixed", "apart"))
    assert mixed[3:] == ["1", "-11.1, +0.0", "18"], "on the nine questions of each seed that both were asked"
    assert apart[3:] == ["0.00024", "-44.4, -100.0", "18"], "13 lost"
    alone, healed = rows(best, "`healed` in `base_lr_shared`")[-2:]
    assert alone[1] == "`apart` in `non_shared`"
    assert alone[2].startswith("+0.0 ("), "nine right of nine that both were asked, of each seed"
    assert healed[1] == "`apart` in `base_lr_shared`"
    assert healed[2].startswith("+65.0 (")
    assert healed[3:] == ["0.00024", "+40.0, +90.0", "20"]


def test_sentences_follow_from_the_numbers(tmp_path: Path) -> None:
    def sentence(right: str) -> str:
        cells = [answers("mixed", "non_shared", 0, "1" * 400), answers("mixed", "base_lr_shared", 0, right)]
        write_report([keep(cells, tmp_path / "r.jsonl")], tmp_path / "page.md")
        (line,) = (at for at in (tmp_path / "page.md").read_text().splitlines() if at.startswith("- `mixed`"))
        return line

    assert "+0.0 points against the best `non_shared`" in sentence("1" * 400)
    assert ", excludes a loss of more than 1 point." in sentence("1" * 400)
    assert "-25.0 points against the best `non_shared` (by seed -25.0)" in sentence("1" * 300 + "0" * 100)
    assert ", shows a loss of more than 1 point." in sentence("1" * 300 + "0" * 100)
    assert ", does not exclude" in sentence("1" * 398 + "00")


def test_kinds_and_costs(page: str) -> None:
    kinds = page.split("### By kind")[1]
    assert "| two_hop | yes_no |" in kinds
    assert rows(kinds, "`mixed`", "`base_lr_shared`")[0][2:] == ["83.3 (12)", "100.0 (8)"]
    assert rows(kinds, "`mixed`", "`full_shared`")[0][2:] == ["2.0", "6.0", "300", "40.0", "300", "500", "10.0"]


def test_times_and_machines(page: str) -> None:
    (run,) = rows(page, "my-team")
    assert run[1:] == ["`base_lr_shared`", "4", "1, 16", "50.0", "6.0", "300", "500", "1.000", "0.500", "A machine"]
    assert rows(page, "A machine") == [["A machine", "3.11.1", "2", "5", "1", "abc, def"]]
    assert all(said in page for said in ("seeds 0, 1,", "SmolLM2-135M-Instruct learns in 3 ways", "rank 8"))
    assert "lragent eval report records.jsonl -o sharing.md" in page


@pytest.mark.slow
def test_the_page_of_this_project_is_what_its_records_say(tmp_path: Path) -> None:
    kept = (ROOT / "docs" / "sharing.md").read_text()
    (command,) = (line for line in kept.splitlines() if line.startswith("lragent eval report "))
    files = [ROOT / word for word in command.split()[3:-2]]
    write_report(files, tmp_path / "sharing.md")
    made = (tmp_path / "sharing.md").read_text().splitlines()
    assert [line for line in kept.splitlines() if line != command] == [
        line for line in made if not line.startswith("lragent eval report ")
    ], "run the command that stands in docs/sharing.md"


def test_every_picture_is_linked_and_the_bytes_are_the_same_twice(page: str, tmp_path: Path) -> None:
    def made() -> dict[str, bytes]:
        return {str(p.relative_to(tmp_path)): p.read_bytes() for p in (tmp_path / "docs").rglob("*") if p.is_file()}

    linked = {f"docs/{part.split(')')[0]}" for part in page.split("](")[1:]}
    before = made()
    assert linked == before.keys() - {"docs/sharing.md"}
    assert linked == {"docs/sharing/accuracy-demo.png", "docs/sharing/cost-demo.png"}
    write_report([tmp_path / "records.jsonl"], tmp_path / "docs" / "sharing.md")
    assert made() == before


def test_what_no_record_is_about_is_left_out(tmp_path: Path) -> None:
    write_report([keep([speed()], tmp_path / "speed.jsonl")], tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert "## Times" in text
    assert not any(heading in text for heading in ("## Answers", "## Why", "## Real text", "## What was measured"))
    assert not (tmp_path / "page").exists(), "no pictures"


def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    good, bad = keep(study(), tmp_path / "good.jsonl"), tmp_path / "bad.jsonl"
    bad.write_text('{"kind": "speed"}\n{"no": "kind"}\n')
    with pytest.raises(UserError, match=r"bad\.jsonl:2"):
        write_report([good, bad], page)
    with pytest.raises(UserError, match=r"missing\.jsonl"):
        write_report([tmp_path / "missing.jsonl"], page)
    with pytest.raises(UserError, match=r"'level'|'right'|'asked'|'mean'"):
        write_report([keep([{"kind": "speed", "label": "x"}], bad)], page)
    with pytest.raises(UserError, match=r"bad\.jsonl: nothing to report"):
        write_report([keep([{"kind": "other"}], bad)], page)
    with pytest.raises(UserError, match="two of seed 0, mixed, non_shared"):
        write_report([good, good], page)
    with pytest.raises(UserError, match=r"must end in \.md"):
        write_report([good], tmp_path / "page")
    assert not page.exists()


def answer(number: int, right: bool) -> Answer:
    numbers = {"iterations": 2, "turns": 6, "context": 300, "generated": 40, "computed": 100 * number, "reused": 7}
    return Answer(f"test-{number}", "two_hop", "x", right, Ending.ACCEPTED, **numbers, seconds=0.5, ttft_s=0.25)


def run_folder(path: Path, workers: int = 4) -> Path:
    """A run as the command leaves it."""
    (path.parent / "world.json").write_text("{}")
    folder = RunFolder(path)
    folder.begin(path.parent / "world.json", "demo", "http://127.0.0.1:1/v1", 45)
    folder.note("endpoint", workers, here=False)
    with AnswerFile(folder.answers("endpoint")) as file:
        for number, right in ((0, True), (2, False), (1, False)):
            file.add(answer(number, right)) if f"test-{number}" not in file.answers else None
    return path


def test_a_run_is_merged(tmp_path: Path) -> None:
    path = run_folder(tmp_path / "team")
    (record,) = merged([path])
    assert [record[name] for name in ("kind", "label", "mode")] == ["speed", "team", "endpoint"]
    assert (record["level"], record["workers"], record["machines"]) == ("demo", [4], [])
    assert (record["asked"], record["right"]) == (3, "100")
    assert record["mean"] | {"computed": 100.0, "seconds": 0.5, "ttft_s": 0.25, "turns": 6.0} == record["mean"]
    run_folder(path, workers=1)
    assert merged([path])[0]["workers"] == [1, 4], "gone on with, at another pace"
    RunFolder(path).note("endpoint", 1, here=True)
    machine, record = merged([path])
    assert machine["kind"] == "machine"
    assert record["machines"] == [machine["machine"]]


def test_what_is_behind_an_open_question_is_told_and_not_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run_folder(tmp_path / "team")
    with AnswerFile(RunFolder(path).answers("non_shared")) as file:
        for number in (1, 2):
            file.add(answer(number, True))
    with AnswerFile(RunFolder(path).answers("endpoint")) as file:
        file.add(answer(4, True))
    assert main(["eval", "merge", str(path), "-o", str(tmp_path / "out.jsonl")]) == 0
    said = capsys.readouterr().out
    assert "endpoint.jsonl: 1 answer is not counted yet" in said
    assert "non_shared.jsonl: 2 answers are not counted yet" in said
    (record,) = read_records([tmp_path / "out.jsonl"])
    assert (record["mode"], record["right"]) == ("endpoint", "100")


def test_folders_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match="of another team; name another folder"):
        RunFolder(run_folder(tmp_path / "team")).begin(tmp_path / "world.json", "demo", "http://elsewhere/v1", 45)
    with pytest.raises(UserError, match="another folder has this name"):
        merged([tmp_path / "team", run_folder(tmp_path / "other" / "team")])
    with pytest.raises(UserError, match="is no folder of"):
        merged([tmp_path / "other"])
    (tmp_path / "other" / "run.json").write_text("[")
    with pytest.raises(UserError, match=r"run\.json"):
        merged([tmp_path / "other"])


class Done:
    """A part of a study that takes no work."""

    name = "part"

    def __init__(self) -> None:
        self.made = False

    def done(self) -> bool:
        return self.made

    def ready(self) -> bool:
        return True

    def make(self, shift: object) -> None:
        self.made = True


def test_a_study_says_where_and_how_it_was_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, part = StudyPlan(level="demo", questions=1), Done()
    monkeypatch.setattr("lragent.eval.study.work.parts_of", lambda folder: [part])
    assert run_study(plan, tmp_path / "one", processes=1, deadline=float("inf"), tell=print, quiet=True)
    machine, plan_of = merged([tmp_path / "one"])
    assert (machine["kind"], plan_of["kind"], plan_of["iterations"]) == ("machine", "study", plan.asking.iterations)
    StudyFolder(tmp_path / "two", StudyPlan(level="demo", questions=1, training=Training(lr=1.0))).begin()
    with pytest.raises(UserError, match="two: is a study with another `training`"):
        merged([tmp_path / "one", tmp_path / "two"])
