"""How many slots the cache has: from flags and from the memory that is left."""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import torch

from lragent.errors import UserError
from lragent.modes import SharingMode
from lragent.serve.cache.pools import CacheShape

DEFAULT_CACHE_TOKENS = 65_536
"""Slots on a CPU where nobody says how many, and memory is no concern."""
CPU_SHARE = 0.25
"""Of the memory that is free at start: the most that the cache takes on a CPU where nobody says."""
GPU_SHARE = 0.9
"""Of a GPU's memory: the most that this process uses where nobody says."""
CPU_SEQUENCES, GPU_SEQUENCES = 16, 64
"""Requests that run at once."""
CPU_TOKEN_BUDGET, GPU_TOKEN_BUDGET = 512, 8192
"""Tokens per step: a longer prompt is prefilled in chunks of it."""
MOST_NUMBERED = 2**31
"""Slots are numbered in 32 bits on the device."""


@dataclass(frozen=True)
class GpuMemory:
    """A GPU's memory, in bytes: in all; free, as the driver sees it; kept by torch for its next tensors."""

    total: int
    free: int
    kept: int

    @classmethod
    def now(cls, device: torch.device) -> GpuMemory:
        """As it is. The model is to be loaded already."""
        free, total = torch.cuda.mem_get_info(device)
        return cls(total, free, torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))

    def for_cache(self, utilization: float, activations: int) -> int:
        """Bytes for the cache if `utilization` of the memory is used in all and a step takes `activations` at its peak.

        What other processes use counts as used. May be negative.
        """
        return int(self.total * utilization) - (self.total - self.free) + self.kept - activations


def slot_bytes(shape: CacheShape, dtype: torch.dtype, sharing: SharingMode) -> int:
    """Bytes that one slot takes of all layers. In `base_shared` LR entries lie in slots too."""
    own = 0 if sharing is SharingMode.BASE_SHARED else shape.lr_bytes(dtype)
    return shape.base_bytes(dtype) + own


def cache_slots(
    shape: CacheShape,
    dtype: torch.dtype,
    device: torch.device,
    *,
    sharing: SharingMode,
    context: int,
    asked: int | None = None,
    utilization: float = GPU_SHARE,
    activations: int = 0,
) -> int:
    """Slots of the cache.

    asked: --max-tokens-in-cache. context: positions that one sequence may have. utilization: of a GPU's memory, see
    GpuMemory. activations: bytes that a step takes at its peak, on a GPU. Raises UserError naming the flag and the
    mend where not even two slots fit.
    """
    most = MOST_NUMBERED // (shape.lr_per_slot if sharing is SharingMode.BASE_SHARED else 1) - 1
    each = slot_bytes(shape, dtype, sharing)
    if device.type == "cuda":
        memory = GpuMemory.now(device)
        fitting = memory.for_cache(utilization, activations) // each
        if asked is None and fitting < 2:
            raise UserError(
                f"--gpu-memory-utilization: {utilization:g} of {memory.total / 2**30:.1f} GiB leaves nothing for the "
                f"cache, as {(memory.total - memory.free - memory.kept) / 2**30:.1f} GiB are in use and a step takes "
                f"{activations / 2**30:.1f} GiB; raise it, lower --max-num-batched-tokens, or serve a smaller model."
            )
        slots = fitting if asked is None else asked
        if asked is not None and asked * each > memory.free + memory.kept - activations:
            raise UserError(
                f"--max-tokens-in-cache: {asked} tokens take {asked * each / 2**30:.1f} GiB, more than is free; "
                f"ask for fewer, or leave it out."
            )
        return min(slots, most)
    if asked is not None:
        fitting = psutil.virtual_memory().available // each
        if asked > fitting:
            raise UserError(f"--max-tokens-in-cache: {asked} tokens do not fit into the free memory; {fitting} would.")
        return min(asked, most)
    fitting = int(psutil.virtual_memory().available * CPU_SHARE) // each
    if fitting < 2:
        raise UserError("--max-tokens-in-cache: no memory is left for a cache; free some, or serve a smaller model.")
    return min(max(min(fitting, DEFAULT_CACHE_TOKENS), min(context, fitting)), most)


def step_limits(device: torch.device, sequences: int | None, tokens: int | None) -> tuple[int, int]:
    """Requests that run at once, and tokens of one step, as asked or as suits the device.

    sequences: --max-num-seqs; tokens: --max-num-batched-tokens. Raises UserError where both are asked for and a step
    could not hold a token of each request.
    """
    on_gpu = device.type == "cuda"
    if sequences is None:
        sequences = GPU_SEQUENCES if on_gpu else CPU_SEQUENCES
        sequences = sequences if tokens is None else min(sequences, tokens)
    if tokens is not None and tokens < sequences:
        raise UserError(
            f"--max-num-batched-tokens: must be at least --max-num-seqs, which is {sequences}, not {tokens}: each "
            "request that runs takes a token of every step."
        )
    return sequences, tokens or max(GPU_TOKEN_BUDGET if on_gpu else CPU_TOKEN_BUDGET, sequences)
