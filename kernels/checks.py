"""What the public kernels ask of their arguments. Every refusal names the argument and says what it must be."""

from __future__ import annotations

from collections.abc import Iterable

import torch

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
"""The dtypes that the kernels compute in."""

MOST_DIMS = 256
"""The largest head that attention's kernels take; those of serving, in multiples of 8."""

MOST_RANK = 128
"""The largest rank that attention's kernels hold on chip; larger ones (stacked packs) are read through torch."""

MOST_RANK_COPIED = 4096
"""The largest rank that kernels take which read low-rank activations piece by piece, or only copy them."""


class Arguments:
    """Checks the tensors of one call against each other: letters in a shape stand for sizes that must agree."""

    def __init__(self, device: torch.device, **sizes: int) -> None:
        self._device = device
        self._sizes = dict(sizes)
        self._named_by: dict[str, str] = dict.fromkeys(sizes, "the call")

    def __getitem__(self, letter: str) -> int:
        """The size that `letter` stands for."""
        return self._sizes[letter]

    def tensor(
        self,
        name: str,
        value: torch.Tensor,
        shape: str,
        dtypes: torch.dtype | Iterable[torch.dtype],
        *,
        any_stride: bool = False,
    ) -> torch.Tensor:
        """Check one tensor, and take its sizes for the letters of `shape` that are new.

        shape: such as `T Hq D`. The last dimension must be contiguous, unless it too may have `any_stride`. Raises
        ValueError naming the argument.
        """
        allowed = (dtypes,) if isinstance(dtypes, torch.dtype) else tuple(dtypes)
        if value.dtype not in allowed:
            raise ValueError(f"{name}: must be {' or '.join(map(str, allowed))}, not {value.dtype}.")
        if value.device != self._device:
            raise ValueError(f"{name}: must be on {self._device}, not on {value.device}.")
        letters = shape.split()
        if value.dim() != len(letters):
            raise ValueError(f"{name}: must have the shape [{', '.join(letters)}], not {list(value.shape)}.")
        for letter, size in zip(letters, value.shape, strict=True):
            want = int(letter) if letter.isdigit() else self._sizes.setdefault(letter, size)
            if size != want:
                by = f" ({letter} is {want} by {self._named_by[letter]})" if letter in self._named_by else ""
                raise ValueError(f"{name}: must have the shape [{', '.join(letters)}]{by}, not {list(value.shape)}.")
            self._named_by.setdefault(letter, name)
        if not any_stride and value.numel() and value.shape[-1] > 1 and value.stride(-1) != 1:
            raise ValueError(f"{name}: its last dimension must be contiguous; call .contiguous() on it.")
        return value


def check_rank(name: str, rank: int, most: int) -> None:
    """Raises ValueError where a low rank is outside 1..most."""
    if not 1 <= rank <= most:
        raise ValueError(f"{name}: the rank must be between 1 and {most}, not {rank}.")
