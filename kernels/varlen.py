"""Flash-LoRA-Attention with gradients over trajectories laid end to end, in Triton: attention of `shared` training.

One online softmax over the keys feeds two accumulators, `P V_base` and `P LR`; the reader's `B` is applied outside, by
`role_up_heads`. The values are never widened, nothing is padded to a common length, and no score is ever written out.
Results and gradients are the same from run to run: no program adds to what another one writes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from lragent.kernels.checks import FLOATS, MOST_DIMS, MOST_RANK, Arguments, check_rank
from lragent.kernels.low_rank import role_up_heads
from lragent.kernels.sizes import Device
from lragent.kernels.varlen_backward import run_backward
from lragent.kernels.varlen_forward import run_forward
from lragent.kernels.varlen_layout import Blocks, VarlenLayout


def varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    low: torch.Tensor | None,
    layout: VarlenLayout,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    blocks: Blocks | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Causal attention of each trajectory over `[V_base | LR]`: `P V_base` and `P LR` apart. Differentiable.

    query: [Hq, T, D]; key, value: [Hkv, T, D], D at most 256, all bfloat16, float16 or float32; low: [T, r], r at most
    128, taken in the dtype of the values. `P = softmax(softcap * tanh(scale q k^T / softcap))`, or without the cap. A
    query sees itself and, with a window, the `window - 1` tokens before it. Only the last dimension must be contiguous.
    blocks: other tiles than `Blocks.of` gives. Returns out [T, Hq, D] and low_out [T, Hq, r], which is None without
    `low`. Raises ValueError naming the argument.
    """
    args = Arguments(query.device, T=layout.tokens)
    args.tensor("query", query, "Hq T D", FLOATS)
    args.tensor("key", key, "Hkv T D", query.dtype)
    args.tensor("value", value, "Hkv T D", query.dtype)
    if layout.device != query.device:
        raise ValueError(f"layout: must be on {query.device}, not on {layout.device}.")
    if args["Hq"] % args["Hkv"]:
        raise ValueError(f"query: must have a multiple of {args['Hkv']} heads, not {args['Hq']}.")
    if args["D"] > MOST_DIMS:
        raise ValueError(f"query: heads may have at most {MOST_DIMS} dimensions, not {args['D']}.")
    if low is not None:
        args.tensor("low", low, "T r", FLOATS)
        check_rank("low", args["r"], MOST_RANK)
    for name, number in (("scale", scale), ("window", window), ("softcap", softcap)):
        if number is not None and number <= 0:
            raise ValueError(f"{name}: must be greater than 0, not {number}.")
    if blocks is None:
        roomy = Device.of(query.device).shared_program >= 227 << 10  # bytes, as on an H100
        blocks = Blocks.of(args["D"], 0 if low is None else args["r"], query.dtype, roomy)
    out: tuple[torch.Tensor, torch.Tensor | None] = _VarlenAttention.apply(
        query, key, value, low, layout, blocks, float(scale), window, None if softcap is None else float(softcap)
    )
    return out


def varlen_lora_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    low: torch.Tensor | None,
    up: torch.Tensor | None,
    roles: torch.Tensor,
    layout: VarlenLayout,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    blocks: Blocks | None = None,
) -> torch.Tensor:
    """`lora_attention` of each trajectory alone, each query reading through its own role's `B`. Differentiable.

    up: [n_roles, r, Hkv * D]; roles: [T], the readers; the rest as in `varlen_attention`. Returns [T, Hq, D].
    """
    heads, tokens, dim = query.shape
    kv_heads = key.shape[0]
    if up is None:
        low = None  # nobody reads it
    options: dict[str, Any] = {"scale": scale, "window": window, "softcap": softcap, "blocks": blocks}
    out, low_out = varlen_attention(query, key, value, low, layout, **options)
    if low is None or low_out is None or up is None:
        return out
    args = Arguments(query.device, T=tokens, r=low.shape[1])
    args.tensor("up", up, f"N r {kv_heads * dim}", FLOATS, any_stride=True)
    args.tensor("roles", roles, "T", (torch.int64, torch.int32))
    low_out = low_out.transpose(0, 1).reshape(kv_heads, heads // kv_heads, tokens, -1)
    added = role_up_heads(low_out.to(up.dtype), up, roles).reshape(heads, tokens, dim).transpose(0, 1)
    return out + added.to(out.dtype)


class _VarlenAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        low: torch.Tensor | None,
        layout: VarlenLayout,
        blocks: Blocks,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        filled, rank = None, 0
        if low is not None:
            rank = low.shape[1]
            wide = max(16, 1 << (rank - 1).bit_length())
            filled = F.pad(low.to(value.dtype), (0, wide - rank)).contiguous()  # T * r numbers: kernels need no mask
        out, low_out, lse = run_forward(query, key, value, filled, rank, layout, blocks.forward, scale, window, softcap)
        ctx.save_for_backward(query, key, value, filled, out, low_out, lse)
        ctx.rest = (layout, blocks, scale, window, softcap)
        ctx.low_is = None if low is None else (rank, low.dtype)
        return out, low_out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, low_grad: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        query, key, value, filled, out, low_out, lse = ctx.saved_tensors
        dquery, dkey, dvalue, dlow = run_backward(
            grad, low_grad, query, key, value, filled, out, low_out, lse, *ctx.rest
        )
        if dlow is not None:
            rank, dtype = ctx.low_is
            dlow = dlow[:, :rank].to(dtype)
        return dquery, dkey, dvalue, dlow, None, None, None, None, None
