"""Folders of studies and of runs as one list of records, which a report is made of."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from lragent.errors import UserError
from lragent.eval.machines import MACHINE, machines_of
from lragent.eval.records import Record
from lragent.eval.run_folder import RUN, speeds_of
from lragent.eval.study.folder import PLAN
from lragent.eval.study.merge import records_of


def merged(folders: Sequence[Path], tell: Callable[[str], None] = lambda sentence: None) -> list[Record]:
    """Records of kinds `machine`, `study`, `training` and `answers` (of `lragent eval study`) and `speed` (of `lragent
    eval run`). `tell` is given what is not counted. Raises UserError naming the folder that is neither, or contradicts
    one before it."""
    for path in folders:
        if not any((path / name).is_file() for name in (PLAN, RUN)):
            raise UserError(f"{path}: is no folder of `lragent eval study` or `lragent eval run`.")
    machines = {json.dumps(facts, sort_keys=True): facts for path in folders for facts in machines_of(path)}
    return [
        *({"kind": MACHINE, **machines[text]} for text in sorted(machines)),
        *records_of([path for path in folders if (path / PLAN).is_file()], tell),
        *speeds_of([path for path in folders if (path / RUN).is_file()], tell),
    ]
