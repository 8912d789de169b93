"""Which sizes the attention kernels are compiled for: what was fastest on an H100, made to fit elsewhere.

Measured with `python -m lragent.bench kernels`. Of the multiprocessors' shared memory two programs each should have a
half, so that one computes while the other waits for its tile.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton

from lragent.kernels.launch import padded
from lragent.kernels.plan import Sizes


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

    def shared(self, sizes: Sizes) -> int:
        """About how many bytes of shared memory a program takes (read off compiled kernels)."""
        dim, low = padded(self.dim), padded(self.rank_v) + (padded(self.rank_k) if self.rank_k else 0)
        buffers = max((sizes.stages - 1) // 2, 1) + (sizes.block_m >= 64)
        tiles = buffers * sizes.block_n * (2 * dim + low)
        return (tiles + sizes.block_m * dim * 2 + low * dim) * self.itemsize + 4096


def split_sizes(shape: Shape, device: Device) -> Sizes | None:
    """For few new tokens: the least rows that hold them, since the tile of keys costs the same for all."""
    both = 2 * device.processors
    if shape.rank_k:
        wanted = Sizes(min(max(16, triton.next_power_of_2(shape.rows)), 64), 32, 4, 5, both)
    elif shape.rows <= 16:
        wanted = Sizes(16, 128, 4, 3, both)
    elif shape.rows <= 32:
        wanted = Sizes(32, 64, 4, 5, both)
    elif shape.rows <= 64:
        wanted = Sizes(64, 64, 4, 3, both)
    else:
        wanted = Sizes(128, 64, 8, 5, device.processors, one_loop=False)
    return _fit(wanted, shape, device)


def prefill_sizes(shape: Shape, device: Device) -> Sizes | None:
    """For long chunks."""
    wanted = Sizes(128, 32, 8, 3) if shape.rank_k else Sizes(128, 64, 8, 5)
    return _fit(wanted, shape, device)


def _fit(sizes: Sizes, shape: Shape, device: Device) -> Sizes | None:
    """Fewer stages, then smaller tiles, then fewer rows, until a program's share of shared memory is enough.

    None where nothing is small enough.
    """
    at_once = 2 if sizes.programs > device.processors else 1
    limit = min(device.shared_program, device.shared_processor // at_once - 1024)
    while shape.shared(sizes) > limit:
        if sizes.stages > 3:
            sizes = replace(sizes, stages=sizes.stages - 2)
        elif sizes.block_n > 32:
            sizes = replace(sizes, block_n=sizes.block_n // 2)
        elif limit < device.shared_program:
            limit = device.shared_program  # one program at a time, then
        elif sizes.block_m > 16:
            sizes = replace(sizes, block_m=sizes.block_m // 2, warps=4)
        elif sizes.block_n > 16:
            sizes = replace(sizes, block_n=16)
        else:
            return None
    return sizes
