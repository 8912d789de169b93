"""Which sizes the attention kernels are compiled for: what was fastest on an H100, made to fit elsewhere.

Measured with `python -m lragent.bench kernels`. Of the multiprocessors' shared memory two programs each should have a
half, so that one computes while the other waits for its tile.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton

from lragent.kernels.launch import padded
from lragent.kernels.plan import Blocks


@dataclass(frozen=True)
class Device:
    """processors: multiprocessors; shared: bytes of shared memory that a program may have, and that a processor has."""

    processors: int
    shared_program: int
    shared_processor: int

    @classmethod
    def of(cls, device: torch.device) -> Device:
        """What a CUDA device has; elsewhere (Triton's interpreter) a small one."""
        if device.type != "cuda":
            return cls(3, 1 << 20, 1 << 20)
        found = torch.cuda.get_device_properties(device)
        of_program: int = found.shared_memory_per_block_optin  # type: ignore[attr-defined]  # torch's stubs lack it
        return cls(found.multi_processor_count, of_program, found.shared_memory_per_multiprocessor)


@dataclass(frozen=True)
class Shape:
    """What the sizes depend on. rows: query heads of one key head times a sequence's most new tokens."""

    rows: int
    dim: int
    rank_v: int
    rank_k: int
    itemsize: int

    def shared(self, blocks: Blocks) -> int:
        """About how many bytes of shared memory a program takes (read off compiled kernels)."""
        dim, low = padded(self.dim), padded(self.rank_v) + (padded(self.rank_k) if self.rank_k else 0)
        buffers = max((blocks.stages - 1) // 2, 1) + (blocks.block_m >= 64)
        tiles = buffers * blocks.block_n * (2 * dim + low)
        return (tiles + blocks.block_m * dim * 2 + low * dim) * self.itemsize + 4096


def split_blocks(shape: Shape, device: Device) -> Blocks | None:
    """For few new tokens: the least rows that hold them, since the tile of keys costs the same for all."""
    both = 2 * device.processors
    if shape.rank_k:
        wanted = Blocks(min(max(16, triton.next_power_of_2(shape.rows)), 64), 32, 4, 5, both)
    elif shape.rows <= 16:
        wanted = Blocks(16, 128, 4, 3, both)
    elif shape.rows <= 32:
        wanted = Blocks(32, 64, 4, 5, both)
    elif shape.rows <= 64:
        wanted = Blocks(64, 64, 4, 3, both)
    else:
        wanted = Blocks(128, 64, 8, 5, device.processors, one_loop=False)
    return _fit(wanted, shape, device)


def prefill_blocks(shape: Shape, device: Device) -> Blocks | None:
    """For long chunks."""
    wanted = Blocks(128, 32, 8, 3) if shape.rank_k else Blocks(128, 64, 8, 5)
    return _fit(wanted, shape, device)


def _fit(blocks: Blocks, shape: Shape, device: Device) -> Blocks | None:
    """Fewer stages, then smaller tiles, then fewer rows, until a program's share of shared memory is enough.

    None where nothing is small enough.
    """
    at_once = 2 if blocks.programs > device.processors else 1
    limit = min(device.shared_program, device.shared_processor // at_once - 1024)
    while shape.shared(blocks) > limit:
        if blocks.stages > 3:
            blocks = replace(blocks, stages=blocks.stages - 2)
        elif blocks.block_n > 32:
            blocks = replace(blocks, block_n=blocks.block_n // 2)
        elif limit < device.shared_program:
            limit = device.shared_program  # one program at a time, then
        elif blocks.block_m > 16:
            blocks = replace(blocks, block_m=blocks.block_m // 2, warps=4)
        elif blocks.block_n > 16:
            blocks = replace(blocks, block_n=16)
        else:
            return None
    return blocks
