"""On which machines the work in a folder was done: a small file for each, so that many can write at once."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from lragent.atomic import write_file
from lragent.bench.machine import facts
from lragent.errors import UserError
from lragent.eval.records import Record

FOLDER, MACHINE = "machines", "machine"


def note_machine(folder: Path) -> None:
    """Write down, in `folder/machines/`, on what this process is about to measure or train."""
    text = json.dumps(_here(), sort_keys=True)
    (folder / FOLDER).mkdir(exist_ok=True)
    write_file(folder / FOLDER / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json", text.encode())


def machine_record() -> Record:
    """The same as a record, for those who write no folder."""
    return {"kind": MACHINE, **_here()}


def _here() -> dict[str, Any]:
    return facts(torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))


def machines_of(folder: Path) -> list[dict[str, Any]]:
    """What was written down there. Raises UserError naming the file that is none of these."""
    found = []
    for path in sorted((folder / FOLDER).glob("*.json")):
        try:
            found.append(json.loads(path.read_text(encoding="utf-8")))
            found[-1]["machine"]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path}: holds no facts of a machine ({error}); remove it.") from error
    return found
