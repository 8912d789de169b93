"""Kernels run on a CUDA device where there is one, else in Triton's interpreter."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel's file is imported


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.gpu) if torch.cuda.is_available() else "cpu"])
def device(request: pytest.FixtureRequest) -> str:
    """Where a kernel test runs; its tests are marked `gpu` where that is a CUDA device."""
    return request.param
