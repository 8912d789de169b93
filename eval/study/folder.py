"""Where the parts of a study lie, and who works on them: several processes may work in one folder."""

from __future__ import annotations

import dataclasses
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import yaml

from lragent.atomic import TEMPORARY_PREFIX, write_file
from lragent.config import dump_config, load_config
from lragent.errors import UserError
from lragent.eval.study.plan import StudyPlan
from lragent.modes import SharingMode

T = TypeVar("T")

PLAN, LOCKS = "plan.yaml", "locks"


def fixed_of(plan: StudyPlan) -> dict[str, Any]:
    """By name, what a study that has begun keeps of its plan: what is there already follows from it."""
    dumped = dump_config(plan)
    fixed = {name: dumped[name] for name in ("level", "train", "test", "training")}
    return fixed | {"asking.iterations": plan.asking.iterations}


class StudyFolder:
    """The folder of one study.

    `plan.yaml`; for each seed `seed-N/world/`, `seed-N/packs/REGIME.safetensors` and beside it a `.json` of what its
    training took, `seed-N/answers/REGIME.MODE.jsonl`; `machines/`, on what that was done; and `locks/`.
    """

    def __init__(self, path: Path, plan: StudyPlan) -> None:
        self.path, self.plan = path, plan

    def begin(self) -> None:
        """Makes the folder, or goes on with it. Raises UserError where it holds another study, or answers of no pack.

        `plan.yaml` then names the seeds, regimes and modes of all that was ever begun here: their answers stay.
        """
        path = self.path
        if path.exists() and not path.is_dir():
            raise UserError(f"{path}: is a file; give the folder of a study, or a new one.")
        others = (
            [each for each in path.iterdir() if not each.name.startswith(TEMPORARY_PREFIX)] if path.exists() else []
        )
        if others and not ((path / PLAN).is_file() or {each.name for each in others} == {LOCKS}):
            raise UserError(f"{path}: holds files that are no study's; choose a new folder.")
        (path / LOCKS).mkdir(parents=True, exist_ok=True)
        with (path / LOCKS / PLAN).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # who begins beside us adds to what we have written, or we to theirs
            plan = self._joined(load_config(StudyPlan, path / PLAN)) if (path / PLAN).is_file() else self.plan
            self._check_packs()
            write_file(path / PLAN, yaml.safe_dump(dump_config(plan), sort_keys=False).encode())

    def _joined(self, begun: StudyPlan) -> StudyPlan:
        """This plan, with the seeds, regimes and modes of `begun` besides."""
        for name, value in fixed_of(begun).items():
            if value != fixed_of(self.plan)[name]:
                raise UserError(f"{self.path}: holds a study with another `{name}`; choose another folder.")
        return dataclasses.replace(
            self.plan,
            seeds=_united(begun.seeds, self.plan.seeds),
            regimes=_united(begun.regimes, self.plan.regimes),
            modes=_united(begun.modes, self.plan.modes),
        )

    def _check_packs(self) -> None:
        """What would be trained anew must not have answered yet: two packs would stand in one cell."""
        for seed in self.plan.seeds:
            for regime in self.plan.regimes:
                files = (self.answers(seed, regime, mode) for mode in SharingMode)
                old = [path for path in files if path.is_file() and path.stat().st_size]
                if old and not self.facts(seed, regime).is_file():
                    pack = self.pack(seed, regime)
                    raise UserError(
                        f"{old[0]}: was answered by a pack that is not here; bring {pack.name} and its .json back, "
                        f"leave {regime} out of `regimes`, or remove its answers, which are no other training's."
                    )

    def seed(self, seed: int) -> Path:
        """Everything of one seed."""
        return self.path / f"seed-{seed}"

    def world(self, seed: int) -> Path:
        """Its training data and test world."""
        return self.seed(seed) / "world"

    def pack(self, seed: int, regime: str) -> Path:
        """A regime's roles."""
        return self.seed(seed) / "packs" / f"{regime}.safetensors"

    def facts(self, seed: int, regime: str) -> Path:
        """What training them took; written after the pack."""
        return self.pack(seed, regime).with_suffix(".json")

    def answers(self, seed: int, regime: str, mode: SharingMode) -> Path:
        """What they answered in a mode."""
        return self.seed(seed) / "answers" / f"{regime}.{mode}.jsonl"

    @contextmanager
    def claim(self, name: str) -> Iterator[bool]:
        """Whether this process may work on the part `name`: no other does. Ends with the block, or the process."""
        with (self.path / LOCKS / name.replace("/", ".")).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True


def _united(first: tuple[T, ...], second: tuple[T, ...]) -> tuple[T, ...]:
    return tuple(dict.fromkeys((*first, *second)))
