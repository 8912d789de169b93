"""Checkpoints that lose nothing: whole or not there, verified when read, the same for any number of processes.

Beside the output folder `out` lies `out.partial` while a run lasts. In it each checkpoint is a folder, `step-00000120`:
adapters and the optimizer's moments in one safetensors file, everything else as JSON, the rows of metrics so far, and a
marker that is written last and holds the digest of each. What a step learns from, its dropout too, follows from the
seed and the step's number, so no generator's state need be kept.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from lragent.atomic import TEMPORARY_PREFIX, new_folder
from lragent.errors import UserError

STATE, RUN, ROWS, MARKER = "state.safetensors", "run.json", "metrics.jsonl", "COMPLETE"
VERSION = 1

_NAME = re.compile(r"step-(\d{8,})")


class CheckpointWarning(UserWarning):
    """A checkpoint that cannot be used was passed over."""


@dataclass(frozen=True)
class Progress:
    """How far a run had come."""

    phase: int
    """Of its phases, counted from 0."""
    step: int
    """Optimizer steps of this phase that are done."""
    done: int
    """Optimizer steps of all phases that are done."""
    spent: tuple[float, float]
    """Seconds for steps in this phase, and for everything in all phases."""
    eval_before: Mapping[str, Any] | None
    """What the evaluation before the first step gave."""
    plan: Mapping[str, Any]
    """What the steps follow from; a resumed run must agree with it."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory: progress, `Strategy.state()` and all rows of metrics so far."""

    progress: Progress
    state: Mapping[str, torch.Tensor]
    rows: Sequence[Mapping[str, Any]]


class Checkpoints:
    """The checkpoints of one run, in the folder `place`. Writing and sweeping are the main process's."""

    def __init__(self, place: Path, *, keep: int) -> None:
        self.place, self._keep = place, keep

    def write(self, checkpoint: Checkpoint) -> Path:
        """Write a checkpoint and remove those that are more than enough; raises UserError where the disk is full.

        Whatever happens, checkpoints that were there before stay readable.
        """
        folder = self.folder(checkpoint.progress.done)
        if folder.is_dir():  # of the run that this one goes on from
            if _whole(folder):  # equal plans give equal checkpoints
                return folder
            self._remove(folder)
        with new_folder(folder) as temporary:
            safetensors.torch.save_file(dict(checkpoint.state), temporary / STATE)
            facts = {"version": VERSION, **dataclasses.asdict(checkpoint.progress)}
            (temporary / RUN).write_text(json.dumps(facts), encoding="utf-8")
            lines = "".join(json.dumps(row) + "\n" for row in checkpoint.rows)
            (temporary / ROWS).write_text(lines, encoding="utf-8")
            digests = {name: _digest(temporary / name) for name in (STATE, RUN, ROWS)}
            (temporary / MARKER).write_text(json.dumps(digests), encoding="utf-8")
        for old in self.folders()[self._keep :]:
            self._remove(old)
        return folder

    def _remove(self, folder: Path) -> None:
        """Take a checkpoint away by its name first, so that none is ever seen half removed."""
        aside = folder.with_name(f"{TEMPORARY_PREFIX}old-{folder.name}")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
        shutil.rmtree(aside)

    def folder(self, done: int) -> Path:
        """Where the checkpoint after so many steps lies."""
        return self.place / f"step-{done:08d}"

    def folders(self) -> list[Path]:
        """All checkpoints, newest first, good or not."""
        if not self.place.is_dir():
            return []
        return sorted((path for path in self.place.iterdir() if _NAME.fullmatch(path.name)), reverse=True)

    def newest(self) -> Checkpoint | None:
        """The newest that is whole; those that are not are passed over with a CheckpointWarning.

        None where there are none at all; raises UserError where there are some and none is whole.
        """
        folders = self.folders()
        for folder in folders:
            try:
                return read_checkpoint(folder)
            except UserError as error:
                warnings.warn(f"{error}; the one before it is taken", CheckpointWarning, stacklevel=2)
        if folders:
            raise UserError(f"no checkpoint in {self.place} is whole; remove that folder to begin anew")
        return None

    def sweep(self) -> None:
        """Remove what a process that was killed had begun to write."""
        if self.place.is_dir():
            for path in self.place.glob(f"{TEMPORARY_PREFIX}*"):
                shutil.rmtree(path, ignore_errors=True)


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read one checkpoint; raises UserError naming it where it is missing, torn or changed, or of another version."""
    try:
        digests = json.loads((folder / MARKER).read_bytes())
        for name in (STATE, RUN, ROWS):
            if digests[name] != _digest(folder / name):
                raise UserError(f"the checkpoint {folder} is damaged: {name} does not match its digest")
        facts = json.loads((folder / RUN).read_bytes())
        if facts.pop("version") != VERSION:
            raise UserError(f"the checkpoint {folder} was written by another version of this program")
        progress = Progress(**{**facts, "spent": tuple(facts["spent"])})
        rows = [json.loads(line) for line in (folder / ROWS).read_text(encoding="utf-8").splitlines()]
        return Checkpoint(progress, safetensors.torch.load_file(folder / STATE), rows)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, safetensors.SafetensorError) as error:
        raise UserError(f"the checkpoint {folder} is not whole ({type(error).__name__})") from error


def _whole(folder: Path) -> bool:
    try:
        read_checkpoint(folder)
    except UserError:
        return False
    return True


def check_plan(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Raise UserError naming the first thing in which a run and the checkpoint it would go on from differ."""
    for name in sorted(mine.keys() | theirs.keys()):
        if mine.get(name) != theirs.get(name):
            raise UserError(
                f"the interrupted run had `{name}` {theirs.get(name)!r}, this one has {mine.get(name)!r}: "
                "give the same, or begin anew (remove the folder ending in `.partial`)."
            )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
