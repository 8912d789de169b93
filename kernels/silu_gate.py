"""SiLU gating in one launch: `silu(gate) * up`, gate and up side by side as one product gives them.

x [T, >= 2 * d]: gate in the first d columns, up in the next d; any stride of rows. Returns [T, d].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from lragent.kernels.checks import FLOATS, Arguments
from lragent.kernels.launch import starts_early

BLOCK = 1024


def silu_gate_reference(x: torch.Tensor, d: int) -> torch.Tensor:
    """The definition, in float32."""
    return F.silu(x[:, :d].float()) * x[:, d : 2 * d].float()


def silu_gate(x: torch.Tensor, d: int) -> torch.Tensor:
    """See the module. Computed in float32 and rounded once. Raises ValueError naming the argument that does not fit."""
    Arguments(x.device).tensor("x", x, "T columns", FLOATS)
    if not 0 < 2 * d <= x.shape[1]:
        raise ValueError(f"d: must be positive and at most half of x's {x.shape[1]} columns, not {d}.")
    out = x.new_empty(x.shape[0], d)
    if out.numel():
        early = starts_early(x.device)
        _silu_gate_kernel[(x.shape[0], triton.cdiv(d, BLOCK))](
            x, out, x.stride(0), d, BLOCK=BLOCK, EVEN=d % BLOCK == 0, EARLY=early, num_warps=4, launch_pdl=early
        )
    return out


@triton.jit
def _silu_gate_kernel(  # type: ignore[no-untyped-def]  # Triton takes the types of parameters from each launch
    p_x, p_out, s_x, d, BLOCK: tl.constexpr, EVEN: tl.constexpr, EARLY: tl.constexpr
):
    """BLOCK columns of one token."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_d = None if EVEN else o_d < d
    gate = tl.load(p_x + token * s_x + o_d, mask=m_d).to(tl.float32)
    up = tl.load(p_x + token * s_x + d + o_d, mask=m_d).to(tl.float32)
    tl.store(p_out + token * d + o_d, (gate * tl.sigmoid(gate) * up).to(p_out.dtype.element_ty), mask=m_d)
