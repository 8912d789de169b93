"""Examples into flat batches of at most so many tokens: no padding, several trajectories one after another."""

import bisect
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lragent.train.data import Example, lengths_of


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """Several trajectories in one row of T tokens; no token may attend beyond its own span.

    Roles are numbers: 0 is `base` (or nobody), `i + 1` the i-th trained role.
    """

    input_ids: Tensor
    """[T] long"""
    position_ids: Tensor
    """[T] long: counted from 0 in each span."""
    spans: list[tuple[int, int]]
    """Half-open, one per trajectory, in order and without gaps."""
    roles: Tensor
    """[T] long: who processes the position."""
    targets: Tensor
    """[T] long: the next token where its loss counts, else -100; -100 at the end of every span."""
    loss_roles: Tensor
    """[T] long: who authored the target; 0 where there is none."""
    sources: tuple[str, ...]
    """Where each trajectory came from ("file:line"), to be named when its loss is not finite."""

    def to(self, device: torch.device | str) -> "PackedBatch":
        """Return the batch with its tensors on `device`."""
        return dataclasses.replace(
            self,
            input_ids=self.input_ids.to(device),
            position_ids=self.position_ids.to(device),
            roles=self.roles.to(device),
            targets=self.targets.to(device),
            loss_roles=self.loss_roles.to(device),
        )


def pack(examples: Sequence[Example]) -> PackedBatch:
    """Lay `examples` one after another."""
    spans, start = [], 0
    for example in examples:
        spans.append((start, start + len(example)))
        start += len(example)
    return PackedBatch(
        input_ids=torch.cat([example.token_ids for example in examples]),
        position_ids=torch.cat([torch.arange(len(example)) for example in examples]),
        spans=spans,
        roles=torch.cat([example.roles for example in examples]),
        targets=torch.cat([example.targets for example in examples]),
        loss_roles=torch.cat([example.loss_roles for example in examples]),
        sources=tuple(example.source for example in examples),
    )


class TokenBatches:
    """Endless batches in an order fixed by the seed: in every epoch each example once, in each batch at most
    `tokens_per_batch` tokens. An example longer than that is a batch of its own.
    """

    def __init__(self, examples: Sequence[Example], *, tokens_per_batch: int, seed: int) -> None:
        if not examples:
            raise ValueError("there are no examples to make batches of")
        self._examples = examples
        self._lengths = lengths_of(examples)
        self._budget = tokens_per_batch
        self._seed = seed
        self._ends: list[int] = []  # of the epochs met so far, counted in batches from the first
        self._latest: tuple[int, list[list[int]]] | None = None

    def count(self, epoch: int) -> int:
        """How many batches `epoch` has."""
        while len(self._ends) <= epoch:
            before = self._ends[-1] if self._ends else 0
            self._ends.append(before + len(self._plan(len(self._ends))))
        return self._ends[epoch] - (self._ends[epoch - 1] if epoch else 0)

    def batch(self, number: int) -> PackedBatch:
        """The batch `number`, counted from 0 over all epochs."""
        while not self._ends or self._ends[-1] <= number:
            self.count(len(self._ends))
        epoch = bisect.bisect_right(self._ends, number)
        plan = self._plan(epoch)
        return pack([self._examples[at] for at in plan[number - (self._ends[epoch] - len(plan))]])

    def _plan(self, epoch: int) -> list[list[int]]:
        """Shuffle, then fill batch after batch in that order; no sorting, so the mixture of lengths is random."""
        if self._latest is not None and self._latest[0] == epoch:
            return self._latest[1]
        generator = torch.Generator().manual_seed((self._seed * 1_000_003 + epoch) % 2**63)
        plan: list[list[int]] = []
        filled = 0
        for index in torch.randperm(len(self._lengths), generator=generator).tolist():
            if not plan or filled + self._lengths[index] > self._budget:
                plan.append([])
                filled = 0
            plan[-1].append(index)
            filled += self._lengths[index]
        self._latest = epoch, plan
        return plan
