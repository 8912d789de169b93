"""A step's numbers on the device: one block of integers, filled by one copy."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lragent.serve.engine.step import Step


@dataclass(frozen=True)
class StepTensors:
    """Views of one block of int32: what the kernels of a step read. See Step for what they hold.

    tokens, positions, roles, base_slots, low_slots: [T]. query_start: [S + 1]. context, rows, keep: [S]. drawn_rows:
    [S], the rows of the sequences whose tokens are kept. Where a step
    is smaller than the block, it is filled up with tokens of nobody, empty sequences, and kept rows of token 0.
    """

    block: torch.Tensor
    tokens: torch.Tensor
    positions: torch.Tensor
    roles: torch.Tensor
    base_slots: torch.Tensor
    low_slots: torch.Tensor
    query_start: torch.Tensor
    context: torch.Tensor
    rows: torch.Tensor
    keep: torch.Tensor
    drawn_rows: torch.Tensor

    @classmethod
    def empty(cls, tokens: int, sequences: int, device: torch.device) -> StepTensors:
        """Room for `tokens` tokens of `sequences` sequences."""
        sizes = [tokens] * 5 + [sequences + 1] + [sequences] * 4
        block = torch.zeros(sum(map(_aligned, sizes)), dtype=torch.int32, device=device)
        fields = block.split([_aligned(size) for size in sizes])
        tensors = cls(block, *(field[:size] for field, size in zip(fields, sizes, strict=True)))
        tensors.base_slots.fill_(-1)
        tensors.low_slots.fill_(-1)
        return tensors

    def fill(self, step: Step, nobody: int) -> None:
        """Copy a step's numbers, without waiting for the device. nobody: the row that is drawn for to fill up."""
        room, rooms = _aligned(len(self.tokens)), _aligned(len(self.context))
        total, pieces = len(step.tokens), len(step.pieces)
        host = torch.zeros(len(self.block), dtype=torch.int32, pin_memory=self.block.is_cuda)
        numbers = host.numpy()
        fields = numbers[: 5 * room].reshape(5, room)
        for field, values in zip(
            fields, (step.tokens, step.positions, step.roles, step.base_slots, step.low_slots), strict=True
        ):
            field[:total] = values
        fields[3:, total:] = -1
        starts = numbers[5 * room : 5 * room + _aligned(len(self.query_start))]
        starts[: pieces + 1] = step.query_start
        starts[pieces + 1 :] = total
        rest = numbers[5 * room + len(starts) :].reshape(4, rooms)
        rest[3] = nobody
        for field, values in zip(rest, (step.context, step.rows, step.keep, step.drawn_rows), strict=True):
            field[: len(values)] = values
        self.block.copy_(host, non_blocking=True)


def _aligned(size: int) -> int:
    """Rounded up to 16 bytes, so that every field begins at such an address: kernels are compiled for that, once."""
    return -(-size // 4) * 4
