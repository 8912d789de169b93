"""Examples into flat batches of at most so many tokens: no padding, several trajectories one after another."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lragent.train.data import Example


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
    """The batches of every epoch, fixed by the seed: each example once, each batch at most `tokens_per_batch` tokens.

    An example longer than that is a batch of its own. Every rank plans the same batches and takes every `world`-th;
    where they do not come out even, the first few are given again at the end, so that all ranks take as many steps.
    """

    def __init__(
        self, examples: Sequence[Example], *, tokens_per_batch: int, seed: int, rank: int = 0, world: int = 1
    ) -> None:
        if not examples:
            raise ValueError("there are no examples to make batches of")
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} is not one of {world}")
        self._examples = examples
        self._lengths = [len(example) for example in examples]
        self._budget = tokens_per_batch
        self._seed = seed
        self._rank = rank
        self._world = world

    def count(self, epoch: int) -> int:
        """How many batches this rank gets in `epoch`; the same for all ranks."""
        return -(-len(self._plan(epoch)) // self._world)

    def epoch(self, epoch: int, *, skip: int = 0) -> Iterator[PackedBatch]:
        """Yield this rank's batches of `epoch`, without the first `skip`, which a resumed run has done already."""
        plan = self._plan(epoch)
        for step in range(skip, self.count(epoch)):
            at = (step * self._world + self._rank) % len(plan)
            yield pack([self._examples[index] for index in plan[at]])

    def _plan(self, epoch: int) -> list[list[int]]:
        """Shuffle, then fill batch after batch in that order; no sorting, so the mixture of lengths is random."""
        generator = torch.Generator().manual_seed((self._seed * 1_000_003 + epoch) % 2**63)
        plan: list[list[int]] = []
        filled = 0
        for index in torch.randperm(len(self._lengths), generator=generator).tolist():
            if not plan or filled + self._lengths[index] > self._budget:
                plan.append([])
                filled = 0
            plan[-1].append(index)
            filled += self._lengths[index]
        return plan
