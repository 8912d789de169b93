"""What studies have found, as records that can be kept: a line for each study, training and cell of answers."""

from __future__ import annotations

import json
import operator
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from lragent.config import dump_config, load_config
from lragent.errors import UserError
from lragent.eval.answers import Answer, Settled, read_answers
from lragent.eval.records import Record
from lragent.eval.study.folder import FIXED, PLAN, StudyFolder
from lragent.eval.study.plan import StudyPlan
from lragent.eval.study.regimes import REGIMES
from lragent.modes import SharingMode

MEANS = ("iterations", "turns", "context", "generated", "computed", "reused", "seconds", "ttft_s")
"""Numbers of an answer whose mean over the questions is kept."""


def records_of(folders: Iterable[Path]) -> list[Record]:
    """The records of several folders of `lragent eval study` as one: kinds `study`, `training` and `answers`.

    A cell that stands in several is put together of all. Raises UserError where they contradict each other.
    """
    trainings: dict[tuple[int, str], Record] = {}
    answers: dict[tuple[int, str, str], dict[str, Answer]] = {}
    first: StudyPlan | None = None
    for path in folders:
        if not (path / PLAN).is_file():
            raise UserError(f"{path}: is no folder of `lragent eval study`.")
        plan = load_config(StudyPlan, path / PLAN)
        first = first or plan
        for name in (*FIXED, "asking.iterations"):
            if operator.attrgetter(name)(plan) != operator.attrgetter(name)(first):
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
    fixed = {name: dump_config(first)[name] for name in FIXED}
    records: list[Record] = [{"kind": "study", **fixed, "iterations": first.asking.iterations}]
    records += [
        {"kind": "training", "level": level, "seed": seed, "regime": regime, **facts}
        for (seed, regime), facts in sorted(trainings.items())
    ]
    records += [
        {"kind": "answers", "level": level, "seed": seed, "regime": regime, "mode": mode, **short}
        for (seed, regime, mode), found in sorted(answers.items())
        if (short := cell_of(found)) is not None
    ]
    return records


def _add(found: dict[Any, Any], key: Any, value: Any, where: Path) -> None:
    if found.setdefault(key, value) != value:
        raise UserError(f"{where}: says of {key} something else than a folder before it; leave one of them out.")


def cell_of(answers: Mapping[str, Answer]) -> Record | None:
    """Answers to questions of one test set, in short: `right` has a 1 or 0 for each question, in order, up to the first
    that is open; `left_out` is how many are answered behind it. None where the first is open."""
    settled = Settled.of(answers)
    found = settled.answers
    if not found:
        return None
    kinds = sorted({answer.kind for answer in found})
    return {
        "asked": len(found),
        "left_out": settled.left_out,
        "right": "".join(str(int(answer.right)) for answer in found),
        "kinds": {
            kind: [sum(a.right for a in found if a.kind == kind), sum(a.kind == kind for a in found)] for kind in kinds
        },
        "endings": dict(sorted(Counter(answer.ending.value for answer in found).items())),
        "mean": {name: round(fmean(getattr(answer, name) for answer in found), 4) for name in MEANS},
    }
