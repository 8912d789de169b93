"""How trajectories laid end to end are cut into tiles for the kernels of `varlen.py`, and how large the tiles are.

Knows no Triton, so that a pass can be laid out anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

ALIGNED = 128
"""What the kernels keep for each query lies in trajectories filled up to this, so that tiles load it without a mask."""


@dataclass(frozen=True)
class Tile:
    """The block of scores that one program holds at a time: queries x keys, powers of two from 16 to 128.

    warps, stages: how many warps share the program, and how many tiles its loop has under way.
    """

    queries: int
    keys: int
    warps: int
    stages: int

    def __post_init__(self) -> None:
        for name in ("queries", "keys"):
            size = getattr(self, name)
            if not 16 <= size <= ALIGNED or size & (size - 1):
                raise ValueError(f"{name}: a tile's side must be a power of two from 16 to {ALIGNED}, not {size}.")


@dataclass(frozen=True)
class Blocks:
    """The tiles of the three kernels: the forward pass, the gradient of keys and values, and that of the queries."""

    forward: Tile
    grad_keys: Tile
    grad_queries: Tile

    def __post_init__(self) -> None:
        if self.grad_keys.queries > self.grad_keys.keys:  # its rounds would run past the padding of a trajectory
            raise ValueError(f"blocks: grad_keys may have at most as many queries as keys, not {self.grad_keys}.")

    @classmethod
    def of(cls, dim: int, rank: int, dtype: torch.dtype, roomy: bool = True) -> Blocks:
        """For heads of `dim` and an LR cache of `rank`, 0 = none; roomy: programs may have an H100's shared memory.

        Compiled for an H100, the inner loops of these spill no register at `dim` 64 and 128 with `rank` up to 16, but
        that of the keys' gradient, at 128, reads 8 unchanging numbers back in every round. Accumulators, and so
        registers, grow with the columns: tiles shrink as these grow.
        """
        columns = _power_of_two(dim) + max(16, _power_of_two(rank))
        if dtype is torch.float32:  # ordinary multiply-adds, not tensor cores: the operands pass through registers
            tile = Tile(32, 32, 4, 1) if columns <= 96 else Tile(32, 32, 8, 1) if columns <= 160 else Tile(16, 32, 8, 1)
            return cls(tile, tile, tile)
        if columns <= 96:
            return cls(Tile(128, 64, 8, 3), Tile(64, 128, 8, 2), Tile(128, 64, 8, 3))
        if columns <= 160 and roomy:
            return cls(Tile(128, 128, 8, 2), Tile(64, 128, 8, 2), Tile(128, 64, 8, 2))
        if columns <= 288 and roomy:
            return cls(Tile(128, 64, 8, 2), Tile(32, 64, 8, 2), Tile(128, 32, 8, 2))
        return cls(Tile(64, 32, 8, 2), Tile(32, 64, 8, 2), Tile(64, 32, 8, 2))


@dataclass(frozen=True, eq=False)
class VarlenLayout:
    """Where the trajectories of a flat batch of T tokens lie: worked out once a pass, used by every layer.

    spans: half-open, covering 0..T in order. Tables are [N, 4] int32 on `device`, a row for each tile: where its
    trajectory begins in the batch, the trajectory's length, where the tile begins in the trajectory, and where the
    trajectory begins in the batch once every trajectory is filled up to a multiple of `ALIGNED` tokens.
    """

    spans: tuple[tuple[int, int], ...]
    device: torch.device
    _tables: dict[tuple[str, int], torch.Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, spans: Sequence[tuple[int, int]], device: torch.device) -> VarlenLayout:
        """Raises ValueError where the spans leave a gap, overlap, or are none."""
        expected = 0
        for start, end in spans:
            if start != expected or end < start:
                raise ValueError(f"spans: must cover 0..T in order; ({start}, {end}) does not begin at {expected}.")
            expected = end
        if not expected:
            raise ValueError("spans: must hold at least one token.")
        device = torch.zeros(0, device=device).device  # with its index, as tensors have it
        return cls(tuple((start, end) for start, end in spans), device)

    @property
    def tokens(self) -> int:
        """T."""
        return self.spans[-1][1]

    @property
    def filled_tokens(self) -> int:
        """T, once every trajectory is filled up."""
        return sum(_filled(end - start) for start, end in self.spans)

    def query_tiles(self, size: int) -> torch.Tensor:
        """Tiles of `size` queries, those that see most keys first: what is long must not begin last."""
        return self._table("queries", size)

    def key_tiles(self, size: int) -> torch.Tensor:
        """Tiles of `size` keys, those that most queries see first."""
        return self._table("keys", size)

    def _table(self, kind: str, size: int) -> torch.Tensor:
        if (kind, size) not in self._tables:
            rows, filled = [], 0
            for start, end in self.spans:
                rows += [(start, end - start, begin, filled) for begin in range(0, end - start, size)]
                filled += _filled(end - start)
            rows.sort(key=lambda row: row[2] if kind == "queries" else row[1] - row[2], reverse=True)
            self._tables[kind, size] = torch.tensor(rows, dtype=torch.int32).to(self.device, non_blocking=True)
        return self._tables[kind, size]


def _filled(length: int) -> int:
    return -(-length // ALIGNED) * ALIGNED


def _power_of_two(size: int) -> int:
    return 1 << max(0, size - 1).bit_length()
