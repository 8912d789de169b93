"""The kernels around the model's large products against their definitions: skinny products, RMSNorm, SiLU gating."""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_close

from lragent.kernels.ops import project
from lragent.kernels.rms_norm import rms_norm, rms_norm_reference
from lragent.kernels.silu_gate import silu_gate, silu_gate_reference
from lragent.kernels.skinny_linear import MOST_TOKENS, skinny_linear, skinny_linear_reference


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=str)
def dtype(request: pytest.FixtureRequest, device: str) -> torch.dtype:
    if device == "cpu" and request.param is torch.bfloat16:
        pytest.skip("bfloat16 in Triton's interpreter is not what a device computes")
    return request.param


@pytest.mark.parametrize("around", ["plain", "bias", "norm", "gated", "residual", "everything"])
@pytest.mark.parametrize(
    ("tokens", "d_in", "rows"), [(1, 64, 20), (1, 1600, 12), (1, 2048, 8), (2, 64, 36), (7, 300, 10), (16, 128, 66)]
)
def test_skinny_products_are_as_defined(
    tokens: int, d_in: int, rows: int, around: str, dtype: torch.dtype, device: str
) -> None:
    gated = around in ("gated", "everything")
    x = torch.randn(tokens, 2 * d_in, device=device).to(dtype)[:, d_in:]  # rows that do not touch
    weight = (torch.randn(rows + 2, d_in, device=device) / d_in**0.5).to(dtype)[1:-1]
    options = {
        "bias": torch.randn(rows, device=device).to(dtype) if around in ("bias", "everything") else None,
        "norm": (torch.rand(d_in, device=device).to(dtype), 1e-5) if around in ("norm", "everything") else None,
        "residual": torch.randn(tokens, rows // 2 if gated else rows, device=device).to(dtype)
        if around in ("residual", "everything")
        else None,
        "gated": gated,
    }
    got = skinny_linear(x, weight, **options)
    assert got.dtype is dtype
    assert_close(got, skinny_linear_reference(x, weight, **options), dtype)


def test_a_skinny_product_keeps_its_tokens_apart(device: str) -> None:
    x = torch.randn(5, 64, device=device)
    weight = torch.randn(24, 64, device=device) / 8
    clean = skinny_linear(x, weight, norm=(torch.ones(64, device=device), 1e-6))
    x[2] = torch.nan
    got = skinny_linear(x, weight, norm=(torch.ones(64, device=device), 1e-6))
    assert got[2].isnan().all()
    torch.testing.assert_close(got[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


def test_skinny_products_name_what_does_not_fit(device: str) -> None:
    weight = torch.randn(5, 8, device=device)
    with pytest.raises(ValueError, match=r"^x: at most"):
        skinny_linear(torch.randn(MOST_TOKENS + 1, 8, device=device), weight)
    with pytest.raises(ValueError, match=r"^weight: must have the shape"):
        skinny_linear(torch.randn(1, 9, device=device), weight)
    with pytest.raises(ValueError, match=r"^weight: gated"):
        skinny_linear(torch.randn(1, 8, device=device), weight, gated=True)
    with pytest.raises(ValueError, match=r"^residual: "):
        skinny_linear(torch.randn(1, 8, device=device), weight, residual=torch.randn(1, 4, device=device))
    with pytest.raises(ValueError, match=r"^norm\[0\]: "):
        skinny_linear(torch.randn(1, 8, device=device), weight, norm=(torch.ones(7, device=device), 1e-6))


@pytest.mark.parametrize("dim", [16, 64, 100, 576])
def test_rms_norm_is_as_defined(dim: int, dtype: torch.dtype, device: str) -> None:
    weight = torch.rand(dim, device=device).to(dtype)
    rows = torch.randn(5, 3 * dim, device=device).to(dtype)
    assert_close(
        rms_norm(rows[:, dim : 2 * dim], weight, 1e-5), rms_norm_reference(rows[:, dim : 2 * dim], weight, 1e-5), dtype
    )
    heads = rows.view(5, 3, dim)[:, 1:]
    got = rms_norm(heads, weight, 1e-3)
    assert got.shape == (5, 2, dim)
    assert_close(got, rms_norm_reference(heads, weight, 1e-3), dtype)
    with pytest.raises(ValueError, match=r"^weight: "):
        rms_norm(rows, weight, 1e-5)


@pytest.mark.parametrize("d", [24, 1024, 1500])
def test_silu_gating_is_as_defined(d: int, dtype: torch.dtype, device: str) -> None:
    x = torch.randn(3, 2 * d + 8, device=device).to(dtype)
    assert_close(silu_gate(x, d), silu_gate_reference(x, d), dtype)
    with pytest.raises(ValueError, match=r"^d: "):
        silu_gate(x, d + 5)


def test_float16_survives_channels_that_a_norm_makes_small(device: str) -> None:
    """The first token of a text may have a channel of some thousands, and its norm's weight may be large."""
    x = torch.randn(4, 64, device=device).half()
    x[0, 5] = 6000
    weight, norm = torch.randn(8, 64, device=device).half() / 8, torch.full((64,), 12.0, device=device).half()
    expected = skinny_linear_reference(x, weight, norm=(norm, 1e-5))
    assert_close(project(x, weight, norm=(norm, 1e-5)), expected, torch.float16)
