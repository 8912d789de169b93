"""The sequences that a sharing mode makes of a trajectory, laid end to end so that one pass computes them all.

In the modes with one writer per token a trajectory is one sequence, whose roles change from position to position. In
the others every role has a sequence of its own; in `base_shared` these read one base cache, which each position's role
writes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lragent.modes import SharingMode
from lragent.train.data import NO_TARGET, Example


def target_positions(example: Example) -> Tensor:
    """[n] long: where the next token was authored by a role."""
    return (example.targets != NO_TARGET).nonzero().squeeze(-1)


@dataclass(frozen=True, eq=False)
class Streams:
    """T places in all. Nothing is read across spans, but through `written`."""

    token_ids: Tensor
    """[T] long"""
    position_ids: Tensor
    """[T] long: counted from 0 in each span."""
    roles: Tensor
    """[T] long: who processes the place."""
    spans: tuple[tuple[int, int], ...]
    """Half-open."""
    kept: Tensor
    """[n] long: the places that predict the targets, in the order of the trajectory."""
    written: Tensor | None
    """[T] long: the place whose base key and value are read in each place's stead; None where it is always its own."""

    def __len__(self) -> int:
        return self.token_ids.numel()

    @classmethod
    def of(cls, example: Example, mode: SharingMode) -> Streams:
        """Those of one trajectory, each no longer than what somebody reads of it. CPU."""
        targets = target_positions(example)
        roles = example.roles[: int(targets[-1]) + 1]
        if mode.one_writer_per_token:
            return cls.of_rows(example, [roles], targets)
        shares = mode is SharingMode.BASE_SHARED
        # A role runs up to the last position of which its own hidden state is wanted.
        wanted = torch.arange(len(roles)) if shares else targets
        last = dict(zip(roles[wanted].tolist(), wanted.tolist(), strict=True))
        starts, rows, filled = torch.zeros(max(last) + 1, dtype=torch.long), [], 0
        for role, at in sorted(last.items()):
            rows.append(torch.full((at + 1,), role))
            starts[role] = filled
            filled += at + 1
        writers = [starts[roles[: len(row)]] + torch.arange(len(row)) for row in rows]
        return cls.of_rows(example, rows, starts[roles[targets]] + targets, torch.cat(writers) if shares else None)

    @classmethod
    def of_rows(cls, example: Example, rows: list[Tensor], kept: Tensor, written: Tensor | None = None) -> Streams:
        """One stream for each of `rows`, which says the roles [L] of the trajectory's first L positions."""
        lengths = [len(row) for row in rows]
        ends = torch.tensor(lengths).cumsum(0).tolist()
        return cls(
            token_ids=torch.cat([example.token_ids[:length] for length in lengths]),
            position_ids=torch.cat([torch.arange(length) for length in lengths]),
            roles=torch.cat(rows),
            spans=tuple(zip([0, *ends], ends, strict=False)),
            kept=kept,
            written=written,
        )

    @classmethod
    def joined(cls, parts: list[Streams]) -> Streams:
        """Several trajectories' of one mode, one after another."""
        starts = torch.tensor([0, *(len(part) for part in parts)]).cumsum(0).tolist()
        moved = list(zip(parts, starts, strict=False))
        written = [part.written + start for part, start in moved if part.written is not None]
        return cls(
            token_ids=torch.cat([part.token_ids for part in parts]),
            position_ids=torch.cat([part.position_ids for part in parts]),
            roles=torch.cat([part.roles for part in parts]),
            spans=tuple((start + a, start + b) for part, start in moved for a, b in part.spans),
            kept=torch.cat([part.kept + start for part, start in moved]),
            written=torch.cat(written) if written else None,
        )


def packed(examples: Iterable[Example], mode: SharingMode, tokens: int) -> Iterator[list[Streams]]:
    """The streams of `examples`, in order, as many trajectories together as fit into `tokens` places; at least one."""
    together: list[Streams] = []
    for example in examples:
        streams = Streams.of(example, mode)
        if together and sum(map(len, together)) + len(streams) > tokens:
            yield together
            together = []
        together.append(streams)
    if together:
        yield together
