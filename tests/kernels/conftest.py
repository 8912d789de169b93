"""Kernels run on a CUDA device where there is one, else in Triton's interpreter."""

import pytest
import torch

PARAM = pytest.param("cuda", marks=pytest.mark.gpu) if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=[PARAM], scope="session")
def device(request: pytest.FixtureRequest) -> str:
    """Where a kernel test runs; its tests are marked `gpu` where that is a CUDA device."""
    return request.param
