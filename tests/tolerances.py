"""How far a result may be from its reference: one table, by dtype of the computation, for all tests.

For sums over at most a few hundred terms of order one. A test that needs more has found something.
"""

from __future__ import annotations

import torch

TOLERANCES: dict[torch.dtype, dict[str, float]] = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-10},
    torch.float32: {"rtol": 2e-5, "atol": 2e-5},
    torch.float16: {"rtol": 4e-3, "atol": 4e-3},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
}
"""Of one operation."""

MODEL_TOLERANCES: dict[torch.dtype, dict[str, float]] = {
    torch.float32: {"rtol": 1e-4, "atol": 1e-4},
    torch.bfloat16: {"rtol": 5e-2, "atol": 5e-2},
}
"""Of a whole tiny model's logits."""

STEP_TOLERANCES: dict[torch.dtype, float] = {torch.float32: 2e-4, torch.bfloat16: 5e-3}
"""Of a training step's losses and its gradient's norm on another number of processes, relatively: sums are taken in
another order. By the dtype of the base."""


def assert_close(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """`got` equals `expected` as far as one operation in `dtype` allows."""
    torch.testing.assert_close(got.double(), expected.double(), **TOLERANCES[dtype])
