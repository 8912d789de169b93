"""What a study compares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lragent.errors import UserError
from lragent.eval.ask import Asking
from lragent.eval.study.regimes import REGIMES, Training
from lragent.eval.world.generate import with_counts
from lragent.eval.world.levels import Level, level_named
from lragent.modes import SharingMode


@dataclass(frozen=True)
class StudyPlan:
    """Every regime is trained for every seed, and asked in every mode."""

    level: str = "hard"
    """Of the multi-hop world."""
    train: int | None = None
    """Trajectories to train on; None = the level's own number."""
    test: int | None = None
    """Questions of the test world, of which some or all are asked; None = the level's own number."""
    seeds: tuple[int, ...] = (0,)
    """Each has a world, and trainings, of its own."""
    regimes: tuple[str, ...] = tuple(REGIMES)
    modes: tuple[SharingMode, ...] = tuple(SharingMode)
    modes_of: Mapping[str, tuple[SharingMode, ...]] = field(default_factory=dict)
    """Regimes that are asked in other modes than `modes`: `healed: [base_lr_shared]`."""
    questions: int = 1_000
    """Of each regime in each mode: the first ones of the test world."""
    questions_of: Mapping[str, int] = field(default_factory=dict)
    """Regimes, or one of them in one mode, that are asked more or fewer: `{mixed: 4000, per_role.full_shared: 620}`.
    Few will do where nearly every answer is wrong, and cost most there, as who fails asks to the end of the limits."""
    training: Training = field(default_factory=Training)
    asking: Asking = field(default_factory=Asking)

    def __post_init__(self) -> None:
        """Raises UserError naming the field that is out of range."""
        named = {name: name.partition(".") for name in self.questions_of}
        for field_name, names in (
            ("regimes", self.regimes),
            ("modes_of", self.modes_of),
            ("questions_of", [regime for regime, _, _ in named.values()]),
        ):
            for name in names:
                if name not in REGIMES:
                    raise UserError(f"{field_name}: there is no {name!r}; there are {', '.join(REGIMES)}.")
        for name, (_, dot, mode) in named.items():
            if dot and mode not in list(SharingMode):
                raise UserError(f"questions_of.{name}: there is no mode {mode!r}; there are {', '.join(SharingMode)}.")
        lists = {name: getattr(self, name) for name in ("seeds", "regimes", "modes")}
        for name, values in (lists | {f"modes_of.{regime}": modes for regime, modes in self.modes_of.items()}).items():
            if len(set(values)) < max(1, len(values)):
                raise UserError(f"{name}: must name at least one, and none twice.")
        if "healed" in self.regimes:
            self.training.check_healing(self.world().train_count)
        most = self.world().test_count
        others = ((f"questions_of.{name}", count) for name, count in self.questions_of.items())
        for field_name, count in (("questions", self.questions), *others):
            if not 1 <= count <= most:
                raise UserError(f"{field_name}: must be from 1 to the test world's {most} (`test`), not {count}.")

    def cells(self) -> list[tuple[str, SharingMode]]:
        """Each regime with each mode that it is asked in."""
        return [(regime, mode) for regime in self.regimes for mode in self.modes_of.get(regime, self.modes)]

    def asked(self, regime: str, mode: SharingMode) -> int:
        """Questions that `regime` is asked in `mode`."""
        of = self.questions_of
        return of.get(f"{regime}.{mode}", of.get(regime, self.questions))

    def world(self) -> Level:
        """The level with this plan's counts. Raises UserError where there is none of that name."""
        return with_counts(level_named(self.level), train=self.train, test=self.test)
