"""What learns when: one phase for all roles at once, or one for A and the first role, and one for the others."""

from __future__ import annotations

from dataclasses import dataclass

from lragent.train.settings import TrainSettings


@dataclass(frozen=True)
class Phase:
    """A part of a run with an optimizer and a schedule of its own."""

    number: int
    learns_a: bool
    roles: tuple[str, ...]
    """Whose B learns, and whose turns are learnt from."""
    share: float
    """Of the run's time, where that is limited."""


def phases(settings: TrainSettings) -> list[Phase]:
    """The phases of a run, in order."""
    if settings.tying != "sequential":
        return [Phase(0, settings.tying == "joint", settings.roles, 1.0)]
    first, others = settings.roles[:1], settings.roles[1:]
    share = 1 / len(settings.roles)
    return [Phase(0, True, first, share), Phase(1, False, others, 1 - share)]
