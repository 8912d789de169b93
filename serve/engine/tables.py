"""Where each running sequence's tokens lie in the pools, as the device knows it: one row of slots per sequence."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lragent.serve.cache.slots import Slots
from lragent.serve.engine.sequence import Piece


class SlotTables:
    """The tables of one engine. base, low: [rows, context] int32, one tensor where both lie alike."""

    def __init__(self, rows: int, context: int, low_apart: bool, device: torch.device) -> None:
        self.base = torch.zeros(rows, context, dtype=torch.int32, device=device)
        self.low = torch.zeros_like(self.base) if low_apart else self.base

    def update(self, pieces: Sequence[Piece]) -> None:
        """Tell the device of slots that are new, or others, since it was told last."""
        for piece in pieces:
            sequence, lease = piece.sequence, piece.sequence.held
            if lease.told < piece.end:
                self._tell(self.base, sequence.row, lease.told, lease.base_slots[: lease.reserved])
                lease.told = lease.reserved
            if self.low is not self.base and lease.lr_told < piece.end:
                self._tell(self.low, sequence.row, lease.lr_told, lease.lr_slots[: lease.lr_reserved])
                lease.lr_told = lease.lr_reserved

    @staticmethod
    def _tell(table: torch.Tensor, row: int, start: int, slots: Slots) -> None:
        fresh = torch.from_numpy(slots[start:])
        if table.is_cuda:  # pinned memory is not used again before the copy from it is done
            fresh = fresh.pin_memory()
        table[row, start : start + len(fresh)].copy_(fresh, non_blocking=True)
