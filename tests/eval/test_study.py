"""The whole comparison in small: parts made once, gone on with, made side by side and merged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import save_tiny

from lragent.cli.main import main
from lragent.errors import UserError
from lragent.eval.records import read_records
from lragent.eval.study.merge import records_of
from lragent.eval.study.summary import Study


def study(folder: Path, model: Path, *words: str) -> int:
    plan = [
        "level=demo", "train=12", "test=4", "questions=3", "modes=[non_shared,base_lr_shared]",
        f"training.model={model}", "training.dtype=float32", "training.epochs=1", "training.tokens_per_batch=1500",
        "asking.workers=2", "asking.iterations=2", "asking.max_tokens_in_cache=4000",
    ]  # fmt: skip
    return main(["eval", "study", "-o", str(folder), *plan, *words])


@pytest.mark.slow
def test_a_study_is_made_in_parts_gone_on_with_and_merged(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "tiny")
    one, two = tmp_path / "one", tmp_path / "two"
    assert study(one, model, "regimes=[shared]", "--minutes", "0.0001") == 3, "there was no time for anything"
    assert study(one, model, "regimes=[shared]") == 0
    healed = ["questions_of={healed: 4}", "modes_of={healed: [base_lr_shared]}"]
    before = {path: path.read_bytes() for path in one.rglob("*.jsonl")}
    assert study(one, model, "regimes=[shared,healed]", *healed) == 0
    assert all(path.read_bytes() == content for path, content in before.items()), "what is done is not done again"
    assert study(two, model, "seeds=[1]", "regimes=[shared]", "--processes", "2") == 0
    out = tmp_path / "records.jsonl"
    assert main(["eval", "merge", str(one), str(two), "-o", str(out)]) == 0
    made = Study(read_records([out]))
    assert made.seeds == [0, 1]
    assert {(c.regime, c.mode, sum(map(len, c.by_seed.values()))) for c in made.cells.values()} == {
        ("shared", "non_shared", 6), ("shared", "base_lr_shared", 6),
        ("healed", "base_lr_shared", 4),
    }  # fmt: skip
    with pytest.raises(UserError, match="another `training`"):
        study_error(one, model)
    answers = one / "seed-0" / "answers" / "shared.non_shared.jsonl"
    copied = tmp_path / "three"
    (copied / "seed-0" / "answers").mkdir(parents=True)
    (copied / "plan.yaml").write_bytes((one / "plan.yaml").read_bytes())
    lines = answers.read_text().splitlines()
    without = [line for line in lines if json.loads(line)["id"] != "test-1"]
    (copied / "seed-0" / "answers" / answers.name).write_text("\n".join([*without, ""]))
    told: list[str] = []
    (cell,) = (record for record in records_of([copied], told.append) if record["kind"] == "answers")
    assert cell["asked"] == len(cell["right"]) == 1, "the second question was open when the work was broken off"
    assert told[0].startswith("seed 0, shared, non_shared: 1 answer is not counted yet")
    assert records_of([copied, one]) == records_of([one]), "another folder holds its answer"
    changed = json.loads(lines[0]) | {"iterations": 99}
    (copied / "seed-0" / "answers" / answers.name).write_text(json.dumps(changed) + "\n")
    with pytest.raises(UserError, match="something else"):
        records_of([one, copied])
    plan = (one / "plan.yaml").read_text()
    (copied / "plan.yaml").write_text(plan.replace("iterations: ", "iterations: 1"))
    with pytest.raises(UserError, match=r"another `asking\.iterations`"):
        records_of([one, copied])


def study_error(folder: Path, model: Path) -> None:
    """The command's error as it is raised."""
    from lragent.config import load_config
    from lragent.eval.study.folder import StudyFolder
    from lragent.eval.study.plan import StudyPlan

    words = [f"training.model={model}", "questions=3", "level=demo", "train=12", "test=4", "training.lr=1"]
    StudyFolder(folder, load_config(StudyPlan, None, words)).begin()
