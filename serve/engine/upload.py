"""A step's few host numbers on the device, without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def on_device(
    numbers: Sequence[float] | Sequence[Sequence[float]], device: torch.device, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """`numbers` as a tensor on `device`; float64 holds indices exactly too, so that one transfer carries both.

    The pinned copy may go at once: torch's host allocator keeps its memory until the transfer is done.
    """
    if device.type != "cuda":
        return torch.tensor(numbers, dtype=dtype, device=device)
    return torch.tensor(numbers, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


def rows_at(tensor: torch.Tensor, at: Sequence[int]) -> torch.Tensor:
    """The rows of `tensor` [n, …] at the ascending `at`; `tensor` itself where these are all."""
    if len(at) == tensor.shape[0]:
        return tensor
    return tensor.index_select(0, on_device(at, tensor.device, torch.long))
