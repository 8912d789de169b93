"""RMSNorm in one launch, of rows that need not lie side by side.

x [..., D] of two or three dimensions, any strides but the last; weight [D]; returns a new contiguous tensor of x's
shape and dtype: `weight * x / sqrt(mean(x^2) + eps)`, computed in float32 and rounded once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lragent.kernels.checks import FLOATS, Arguments
from lragent.kernels.launch import starts_early


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The definition, in float32."""
    states = x.float()
    return states * torch.rsqrt(states.square().mean(-1, keepdim=True) + eps) * weight.float()


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See the module. Raises ValueError naming the argument that does not fit."""
    arguments = Arguments(x.device)
    arguments.tensor("x", x, "T D" if x.dim() == 2 else "T H D", FLOATS)
    arguments.tensor("weight", weight, "D", FLOATS)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        heads, dim = (1, x.shape[1]) if x.dim() == 2 else x.shape[1:]
        block = triton.next_power_of_2(dim)
        early = starts_early(x.device)
        _rms_norm_kernel[(x.shape[0], heads)](
            x, weight, out, x.stride(0), x.stride(1) if x.dim() == 3 else 0, heads, eps,
            D=dim, BLOCK=block, EARLY=early, num_warps=min(max(block // 512, 1), 8), launch_pdl=early,
        )  # fmt: skip
    return out


@triton.jit
def _rms_norm_kernel(  # type: ignore[no-untyped-def]  # Triton takes the types of parameters from each launch
    p_x, p_weight, p_out, s_token, s_head, heads, eps, D: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr
):
    """One row."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_d = tl.arange(0, BLOCK)
    m_d = None if D == BLOCK else o_d < D
    b_weight = tl.load(p_weight + o_d, mask=m_d).to(tl.float32)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    b_x = tl.load(p_x + token * s_token + head * s_head + o_d, mask=m_d, other=None if D == BLOCK else 0.0)
    b_x = b_x.to(tl.float32)
    b_x *= tl.rsqrt(tl.sum(b_x * b_x, 0) / D + eps)
    tl.store(p_out + (token * heads + head) * D + o_d, (b_x * b_weight).to(p_out.dtype.element_ty), mask=m_d)
