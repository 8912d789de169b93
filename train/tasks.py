"""What is learnt when: the batches of every optimizer step, a function of the seed and the step's number alone.

So neither the number of processes nor an interruption changes what a step learns from. `shared` gives batches of whole
trajectories, one pass for all roles; `per_role` gives each role's view of them; `mixed` gives both in turn.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

from lragent.adapter_set import Objective
from lragent.train.batches import PackedBatch, TokenBatches
from lragent.train.data import NO_TARGET, Example, RoleViews


@dataclass(frozen=True, eq=False)
class Task:
    """A batch, and whether it is one pass for all roles (`shared`) or a pass of each role alone (`per_role`)."""

    batch: PackedBatch
    one_pass: bool
    number: int
    """Counted over the whole run and all processes, from 0: what its dropout is drawn by."""

    @cached_property
    def targets(self) -> int:
        """How many positions are learnt from."""
        return int((self.batch.targets != NO_TARGET).sum())

    @property
    def tokens(self) -> int:
        """How many positions are processed."""
        return self.batch.input_ids.numel()


class Tasks:
    """The batches of an objective, in the order of training."""

    def __init__(
        self,
        objective: Objective,
        examples: Sequence[Example],
        *,
        tokens_per_batch: int,
        batches_per_step: int,
        seed: int,
        roles: Collection[int] | None = None,
    ) -> None:
        """batches_per_step: over all processes. roles: whose views `per_role` takes, None = all."""

        def batches(some: Sequence[Example]) -> TokenBatches:
            return TokenBatches(some, tokens_per_batch=tokens_per_batch, seed=seed)

        self.batches_per_step = batches_per_step
        self._kinds: list[tuple[TokenBatches, bool]] = []
        if objective != "per_role":
            self._kinds.append((batches(examples), True))
        if objective != "shared":
            self._kinds.append((batches(RoleViews(examples, roles)), False))

    def steps(self, epochs: int) -> int:
        """How many optimizer steps `epochs` epochs take, an epoch being one of the first kind of batches."""
        first, _ = self._kinds[0]
        batches = len(self._kinds) * sum(first.count(epoch) for epoch in range(epochs))
        return -(-batches // self.batches_per_step)

    def of_step(self, step: int, *, rank: int = 0, world: int = 1) -> list[Task]:
        """The tasks that process `rank` of `world` has in step `step`, counted from 0; all have as many.

        Batches of one kind stand side by side, so that processes meet the same kind at the same time where they can.
        """
        first = step * self.batches_per_step
        kinds = len(self._kinds)
        numbers = sorted(range(first, first + self.batches_per_step), key=lambda number: number % kinds)
        return [self._task(number) for number in numbers[rank::world]]

    def _task(self, number: int) -> Task:
        turn, kind = divmod(number, len(self._kinds))
        batches, one_pass = self._kinds[kind]
        return Task(batches.batch(turn), one_pass, number)

    def one_epoch(self) -> list[Task]:
        """Every batch of every kind once, in no particular order: for evaluation."""
        return [
            Task(batches.batch(at), one_pass, at) for batches, one_pass in self._kinds for at in range(batches.count(0))
        ]
