"""Where the parts of a study lie, and who works on them: several processes may work in one folder."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from lragent.atomic import write_file
from lragent.config import dump_config, load_config
from lragent.errors import UserError
from lragent.eval.study.plan import StudyPlan
from lragent.modes import SharingMode

PLAN = "plan.yaml"
FIXED = ("level", "train", "test", "training")
"""Fields of the plan that a study which has begun keeps: what is there already follows from them."""


class StudyFolder:
    """The folder of one study.

    `plan.yaml`; for each seed `seed-N/world/`, `seed-N/packs/REGIME.safetensors` and beside it a `.json` of what its
    training took, `seed-N/answers/REGIME.MODE.jsonl`; `machines/`, on what that was done; and `locks/`.
    """

    def __init__(self, path: Path, plan: StudyPlan) -> None:
        self.path, self.plan = path, plan

    def begin(self) -> None:
        """Makes the folder, or goes on with it. Raises UserError where it holds another study."""
        path, plan = self.path, self.plan
        if (path / PLAN).is_file():
            begun = dump_config(load_config(StudyPlan, path / PLAN))
            for name in FIXED:
                if begun[name] != dump_config(plan)[name]:
                    raise UserError(f"{path}: holds a study with another `{name}`; choose another folder.")
        elif path.is_dir() and any(path.iterdir()):
            raise UserError(f"{path}: holds files that are no study's; choose a new folder.")
        (path / "locks").mkdir(parents=True, exist_ok=True)
        write_file(path / PLAN, yaml.safe_dump(dump_config(plan), sort_keys=False).encode())

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
        with (self.path / "locks" / name.replace("/", ".")).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True
