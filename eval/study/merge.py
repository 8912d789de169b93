"""What studies have found, as records that can be kept: a line for each study, training and cell of answers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from lragent.config import load_config
from lragent.errors import UserError
from lragent.eval.answers import Answer, read_answers, settled
from lragent.eval.records import Record
from lragent.eval.study.folder import PLAN, StudyFolder, fixed_of
from lragent.eval.study.plan import StudyPlan
from lragent.eval.study.regimes import REGIMES
from lragent.modes import SharingMode

MEANS = ("iterations", "turns", "context", "generated", "computed", "reused", "seconds", "ttft_s")
"""Numbers of an answer whose mean over the questions is kept."""


def records_of(folders: Iterable[Path], tell: Callable[[str], None] = lambda sentence: None) -> list[Record]:
    """The records of several folders of `lragent eval study` as one: kinds `study`, `training` and `answers`.

    A cell that stands in several is put together of all. `tell` is given what is not counted. Raises UserError where
    they contradict each other.
    """
    trainings: dict[tuple[int, str], Record] = {}
    answers: dict[tuple[int, str, str], dict[str, Answer]] = {}
    first: StudyPlan | None = None
    for path in folders:
        if not (path / PLAN).is_file():
            raise UserError(f"{path}: is no folder of `lragent eval study`.")
        plan = load_config(StudyPlan, path / PLAN)
        first = first or plan
        for name, value in fixed_of(plan).items():
            if value != fixed_of(first)[name]:
                raise UserError(f"{path}: is a study with another `{name}` than the one before it; merge it by itself.")
        folder = StudyFolder(path, plan)
        for seed in plan.seeds:
            for regime in REGIMES:  # whatever is there, also of a plan that asked for more
                if folder.facts(seed, regime).is_file():
                    _add(trainings, (seed, regime), json.loads(folder.facts(seed, regime).read_text()), path)
                for mode in SharingMode:
                    file = folder.answers(seed, regime, mode)
                    cell = answers.setdefault((seed, regime, mode.value), {})
                    for name, answer in read_answers(file).items() if file.is_file() else ():
                        _add(cell, name, answer, file)
    if first is None:
        return []
    level = first.level
    fixed = fixed_of(first)
    records: list[Record] = [{"kind": "study", "iterations": fixed.pop("asking.iterations"), **fixed}]
    records += [
        {"kind": "training", "level": level, "seed": seed, "regime": regime, **facts}
        for (seed, regime), facts in sorted(trainings.items())
    ]
    for (seed, regime, served), found in sorted(answers.items()):
        if counted := settled(found, f"seed {seed}, {regime}, {served}", tell):
            where = {"level": level, "seed": seed, "regime": regime, "mode": served}
            records.append({"kind": "answers", **where, **cell_of(counted)})
    return records


def _add(found: dict[Any, Any], key: Any, value: Any, where: Path) -> None:
    if found.setdefault(key, value) != value:
        raise UserError(f"{where}: says of {key} something else than a folder before it; leave one of them out.")


def cell_of(found: Sequence[Answer]) -> Record:
    """Answers to the first questions of a test set, in short: `right` has a 1 or 0 for each."""
    kinds = sorted({answer.kind for answer in found})
    return {
        "asked": len(found),
        "right": "".join(str(int(answer.right)) for answer in found),
        "kinds": {
            kind: [sum(a.right for a in found if a.kind == kind), sum(a.kind == kind for a in found)] for kind in kinds
        },
        "endings": dict(sorted(Counter(answer.ending.value for answer in found).items())),
        "mean": {name: round(fmean(getattr(answer, name) for answer in found), 4) for name in MEANS},
    }
