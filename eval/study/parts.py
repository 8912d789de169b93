"""The parts of a study: worlds, packs and answers. Each can be made by any process once what it needs is there."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from lragent.atomic import write_file
from lragent.eval.answers import AnswerFile, read_answers, settled
from lragent.eval.ask import ask, free_memory, served
from lragent.eval.study.folder import StudyFolder
from lragent.eval.study.regimes import Teacher
from lragent.eval.world.generate import TEST_FILE, TRAIN_FILE, write_data_set
from lragent.eval.world.testset import load_test_set
from lragent.modes import SharingMode


@dataclass(frozen=True)
class Shift:
    """What a process at work is told: when to begin nothing more (of `time.monotonic`), and how to report."""

    deadline: float
    tell: Callable[[str], None]
    answered: Callable[[], None]


class Part(Protocol):
    """One part."""

    @property
    def name(self) -> str:
        """For people, and for claiming it."""
        ...

    def done(self) -> bool:
        """Whether it is all there."""
        ...

    def ready(self) -> bool:
        """Whether what it needs is there."""
        ...

    def make(self, shift: Shift) -> None:
        """Make it, or what is left of it; where the time runs out, some of it."""
        ...


@dataclass(frozen=True)
class WorldPart:
    """A seed's world."""

    folder: StudyFolder
    seed: int

    @property
    def name(self) -> str:
        return f"seed {self.seed}, world"

    def done(self) -> bool:
        return self.folder.world(self.seed).is_dir()

    def ready(self) -> bool:
        return True

    def make(self, shift: Shift) -> None:
        write_data_set(self.folder.plan.world(), self.seed, self.folder.world(self.seed))


@dataclass(frozen=True)
class PackPart:
    """A regime's roles, trained."""

    folder: StudyFolder
    seed: int
    regime: str

    @property
    def name(self) -> str:
        return f"seed {self.seed}, {self.regime}, training"

    def done(self) -> bool:
        return self.folder.facts(self.seed, self.regime).is_file()

    def ready(self) -> bool:
        return self.folder.world(self.seed).is_dir() and (
            self.regime != "healed" or self.folder.facts(self.seed, "apart").is_file()
        )

    def make(self, shift: Shift) -> None:
        pack = self.folder.pack(self.seed, self.regime)
        pack.parent.mkdir(parents=True, exist_ok=True)
        data = self.folder.world(self.seed) / TRAIN_FILE
        facts = Teacher(self.folder.plan.training, data, self.seed, pack.parent).train(self.regime, pack)
        free_memory()
        write_file(self.folder.facts(self.seed, self.regime), json.dumps(facts).encode())
        shift.tell(f"{self.name}: {facts['tokens']:,} tokens in {facts['seconds']:.0f} s")


@dataclass(frozen=True)
class AnswersPart:
    """A regime's roles asked in one sharing mode."""

    folder: StudyFolder
    seed: int
    regime: str
    mode: SharingMode

    @property
    def name(self) -> str:
        return f"seed {self.seed}, {self.regime}, {self.mode}"

    def done(self) -> bool:
        path = self.folder.answers(self.seed, self.regime, self.mode)
        asked = self.folder.plan.asked(self.regime, self.mode)
        if not path.is_file() or path.read_bytes().count(b"\n") < asked:  # counted in no time, for it is asked often
            return False
        return len(settled(read_answers(path), self.name)) >= asked

    def ready(self) -> bool:
        return self.folder.facts(self.seed, self.regime).is_file()

    def make(self, shift: Shift) -> None:
        plan = self.folder.plan
        test = load_test_set(self.folder.world(self.seed) / TEST_FILE)
        with (
            AnswerFile(self.folder.answers(self.seed, self.regime, self.mode)) as file,
            served(plan.training.model, self.folder.pack(self.seed, self.regime), self.mode, plan.asking) as complete,
        ):
            ask(
                test, plan.asked(self.regime, self.mode), complete, file, plan.asking, deadline=shift.deadline,
                on_answer=lambda answer, episode: shift.answered(),
            )  # fmt: skip
            right = sum(answer.right for answer in file.answers.values())
            shift.tell(f"{self.name}: {right} of {len(file.answers)} right")


def parts_of(folder: StudyFolder) -> list[Part]:
    """All parts, those that others need first; seed by seed, so that what is whole early can be used."""
    parts: list[Part] = []
    plan = folder.plan
    for seed in plan.seeds:
        parts.append(WorldPart(folder, seed))
        trained = {"apart"} if "healed" in plan.regimes else set()
        parts += [PackPart(folder, seed, regime) for regime in sorted({*plan.regimes, *trained})]
        parts += [AnswersPart(folder, seed, regime, mode) for regime, mode in plan.cells()]
    return parts
