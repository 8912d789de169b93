"""A plan measured in one process: engines built as late and dropped as early as can be, what is found kept at once.

Where the caches of all modes fit into memory side by side, over one copy of the weights, the modes take turns within
each round, so that noise falls on all alike. Else one mode after the other is measured, each on an engine of its own.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from lragent.bench.engines import (
    Base,
    Counters,
    EngineOptions,
    MeasuredEngine,
    Memory,
    NoRoomError,
    cache_room,
    free_memory,
    same_weights,
)
from lragent.bench.micro import micro_figures
from lragent.bench.playing import Load, Played, Record
from lragent.bench.roofline import ModelSize, Roofline
from lragent.bench.summary import Round, row
from lragent.bench.trace_plan import Entry, Group, MicroPlan, Plan
from lragent.bench.traces import Planned
from lragent.modes import SharingMode
from lragent.serve.engine.types import EngineDeadError


class System(Protocol):
    """What is measured: an engine in one mode, or an endpoint."""

    @property
    def name(self) -> str: ...
    @property
    def mode(self) -> SharingMode: ...
    @property
    def role_names(self) -> tuple[str, ...]: ...

    def play(self, trace: Sequence[Planned], load: Load, *, seed: int, progress: Callable[[], None]) -> Played: ...
    def begin(self) -> None: ...
    def memory(self) -> Memory | None: ...
    def counters(self) -> Counters | None: ...


@dataclass(frozen=True)
class Limits:
    """How engines are made, and when to stop. Each None derives it from the plan; deadline: of time.monotonic()."""

    slots: int | None = None
    sequences: int | None = None
    token_budget: int | None = None
    one_at_a_time: bool = False
    deadline: float | None = None

    @property
    def over(self) -> bool:
        """Whether nothing new is to be begun."""
        return self.deadline is not None and time.monotonic() >= self.deadline


@dataclass
class Found:
    """What was measured up to now. skipped: what the time limit took away. broken: engines that could not be built."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    micro: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    @property
    def failures(self) -> list[str]:
        """All of them, each with where it happened."""
        of_rows = [f"{label(row)}: {failure}" for row in self.rows for failure in row["failures"]]
        return self.broken + of_rows + [f"micro: {figure['failed']}" for figure in self.micro if "failed" in figure]


class Watcher(Protocol):
    """Told of everything as it comes."""

    def begins(self, what: str, answers: int) -> None:
        """A run of so many requests."""

    def answered(self) -> None:
        """One of them."""

    def records(self, facts: dict[str, Any], records: Sequence[Record]) -> None:
        """A counted run's requests."""

    def keeps(self, found: Found) -> None:
        """Something was added to what is found."""

    def tells(self, sentence: str) -> None:
        """A word on what goes on."""


def label(row: dict[str, Any]) -> str:
    """A row's name for people."""
    load = f"{row['rate']}/s" if row["rate"] else f"x{row['concurrent']}"
    return f"{row['system']}, {row['tokens']} tokens, {row['roles']} roles, {load}"


class Matrix:
    """Measures a plan. seed: of all tokens and arrivals; each round has its own, the same for all systems."""

    def __init__(self, roofline: Roofline | None, limits: Limits, watcher: Watcher, seed: int) -> None:
        self.found = Found()
        self._roofline = roofline
        self._limits = limits
        self._watcher = watcher
        self._seed = seed

    def engines(self, base: Base, plan: Plan) -> None:
        """Everything in `plan`, on engines that are built here."""
        for group in plan.groups():
            if self._limits.over:
                self._skip_group(group)
                continue
            made = self._side_by_side(base, group)
            if made is None:
                self._one_by_one(base, group)
                continue
            if group.micro is not None:
                self._micro(next(engine for engine in made if engine.mode is group.micro.mode), group.micro)
            for entry in group.entries:
                self.measure([engine for engine in made if engine.mode in entry.modes], entry)
            self._close(made, base.device)

    def _side_by_side(self, base: Base, group: Group) -> list[MeasuredEngine] | None:
        """An engine for each mode over the same weights; None where there is one only, or they do not fit."""
        modes = group.modes
        if self._limits.one_at_a_time or len(modes) == 1:
            return None
        made: list[MeasuredEngine] = []
        models = [base.load()]
        slots = sum(self._options(mode, group.of(mode)).slots for mode in modes)
        if slots * ModelSize.of(models[0].config, base.dtype).kv_bytes <= cache_room(base.device):
            models += [same_weights(models[0]) for _ in modes[1:]]
            made = self._built(base, group, models)
        models.clear()
        if len(made) == len(modes):
            return made
        self._close(made, base.device)
        self._watcher.tells("The modes' caches do not fit side by side: one mode after the other.")
        return None

    def _built(self, base: Base, group: Group, models: list[PreTrainedModel]) -> list[MeasuredEngine]:
        """An engine for each mode, as far as memory goes. Takes from `models`."""
        made = []
        for mode in group.modes:
            self._watcher.tells(f"building an engine: {mode}, {group.roles} roles …")
            options = self._options(mode, group.of(mode))
            try:
                made.append(MeasuredEngine(base, models.pop(), mode, group.roles, options, strict=True))
            except (NoRoomError, torch.OutOfMemoryError):
                break
        return made

    def _one_by_one(self, base: Base, group: Group) -> None:
        """One mode after the other, each on an engine of its own."""
        for mode in group.modes:
            own = group.of(mode)
            if self._limits.over:
                self._skip_group(own)
                continue
            self._watcher.tells(f"building an engine: {mode}, {group.roles} roles …")
            engine = None
            try:
                engine = MeasuredEngine(base, base.load(), mode, group.roles, self._options(mode, own))
            except torch.OutOfMemoryError as error:
                self.found.broken.append(f"{mode}, {group.roles} roles: no engine: {str(error).splitlines()[0]}")
            if engine is None:
                free_memory(base.device)
                continue
            if own.micro is not None:
                self._micro(engine, own.micro)
            for entry in own.entries:
                self.measure([engine], entry)
            self._close([engine], base.device)

    def _options(self, mode: SharingMode, own: Group) -> EngineOptions:
        """own: the mode's share of a group."""
        micro, limits = own.micro, self._limits
        slots = [entry.slots(mode) for entry in own.entries] + ([micro.slots] if micro else [])
        positions = [entry.tokens + 1 for entry in own.entries] + ([micro.positions] if micro else [])
        sequences = [entry.load.concurrent for entry in own.entries] + ([micro.sequences] if micro else [])
        return EngineOptions(
            limits.slots or max(slots), max(positions), limits.sequences or max(sequences), limits.token_budget
        )

    @staticmethod
    def _close(engines: list[MeasuredEngine], device: torch.device) -> None:
        for engine in engines:
            engine.close()
        engines.clear()
        free_memory(device)

    def measure(self, systems: Sequence[System], entry: Entry) -> None:
        """One entry on all systems, which take turns; the first round is not counted."""
        if self._limits.over:
            self._skip([f"{system.name}, {entry.tokens} tokens, {entry.roles} roles" for system in systems])
            return
        rounds: dict[str, list[Round]] = {system.name: [] for system in systems}
        for number in range(entry.repeats + 1):
            for system in systems:
                rounds[system.name].append(self._round(system, entry, number))
        for system in systems:
            floor = None
            if self._roofline is not None:
                load = entry.load
                together = 1 if load.rate else load.concurrent
                trace = entry.trace(system.role_names)
                floor = self._roofline.trace(trace, system.mode, load.trajectories, together)
            warm_up, *counted = rounds[system.name]
            found = row(system.name, str(system.mode), entry, counted, floor)
            found["failures"] = [*(f"warm-up, {said}" for said in warm_up.played.failures), *found["failures"]]
            self.found.rows.append({**found, "turns": len(systems) > 1})
        self._watcher.keeps(self.found)

    def _round(self, system: System, entry: Entry, number: int) -> Round:
        trace, load = entry.trace(system.role_names), entry.load
        facts = {
            "system": system.name,
            "context": entry.context,
            "tokens": entry.tokens,
            "roles": entry.roles,
            "concurrent": load.concurrent,
            "rate": load.rate,
        }
        name = f"{label(facts)}, {f'round {number}' if number else 'warm-up'}"
        self._watcher.begins(name, len(trace) * load.trajectories)
        # Of the whole entry, not of the round alone: an endpoint keeps its cache from one entry to the next.
        seed = random.Random(f"{self._seed} {entry} {number}").getrandbits(63)
        try:
            system.begin()
        except EngineDeadError as error:
            return Round(Played(failures=[str(error)], wall_s=math.nan))
        played = system.play(trace, load, seed=seed, progress=self._watcher.answered)
        if number:
            self._watcher.records({**facts, "round": number}, played.records)
        return Round(played, system.memory(), system.counters())

    def _micro(self, engine: MeasuredEngine, plan: MicroPlan) -> None:
        if self._limits.over:
            self._skip(["micro"])
            return
        for figure in micro_figures(engine, plan, self._roofline, self._seed):
            self._watcher.tells(f"micro: {figure['figure']}: {figure.get('value', figure.get('failed'))}")
            self.found.micro.append(figure)
        self._watcher.keeps(self.found)

    def _skip_group(self, group: Group) -> None:
        if group.micro is not None:
            self._skip(["micro"])
        for entry in group.entries:
            modes = [mode for mode in entry.modes if mode in group.modes]
            self._skip([f"{mode}, {entry.tokens} tokens, {entry.roles} roles" for mode in modes])

    def _skip(self, names: Sequence[str]) -> None:
        self.found.skipped += names
        for name in names:
            self._watcher.tells(f"left out by the time limit: {name}")
