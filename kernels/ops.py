"""The kernels of serving: arguments are checked, then the fastest way that takes them is chosen, Triton's or torch's.

Attention through the cache has four ways, all of one meaning (`kernels.cached`): split over the context for few new
tokens; one program per block for many; the context laid out for torch's fused attention, for long chunks of known
lengths; and plain torch, where there is no GPU or a rank is too large.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F

from lragent.kernels.cached import (
    CachedBatch,
    LayerCache,
    Readers,
    Span,
    cached_attention_reference,
    check_cached,
)
from lragent.kernels.checks import MOST_DIMS, MOST_RANK
from lragent.kernels.low_rank import role_up

if TYPE_CHECKING:
    from lragent.kernels.plan import Plan, Sizes

Way = Literal["split", "prefill", "expanded", "torch"]
"""How attention is done."""

# Rates on an H100 at Llama-3.1-8B's shapes, in FLOP/s and bytes/s, and seconds: what `choose_way` reckons with.
KERNEL_RATE, KERNEL_RATE_LOW_KEYS, EXPANDED_RATE = 380e12, 90e12, 630e12
EXPAND_RATE, EXPAND_LAUNCHES = 2.2e12, 100e-6

LEAST_SAVED = 300e-6
"""Seconds of one layer that cuDNN must save: it plans some 65 ms for each new shape, and there are many of short
contexts."""

LEAST_EXPANDED = 128
"""Fewer new tokens of one sequence and role are no work for cuDNN."""

BLOCKS_TO_FILL = 2
"""Blocks for each multiprocessor from which on long chunks need not be split over the context."""


def choose_way(
    query: torch.Tensor, cache: LayerCache, batch: CachedBatch, window: int | None, softcap: float | None
) -> Way:
    """The fastest way that takes these arguments."""
    if not query.is_cuda:
        return "torch"
    if batch.spans and window is None and softcap is None and _expanded_pays(query, cache, batch.spans):
        return "expanded"
    blocks = len(batch.roles) * query.shape[1] / 128
    processors = torch.cuda.get_device_properties(query.device).multi_processor_count
    way: Way = "split" if blocks < BLOCKS_TO_FILL * processors else "prefill"
    return way if _kernel_sizes(query, cache, batch, way) is not None else "torch"


def _kernel_sizes(query: torch.Tensor, cache: LayerCache, batch: CachedBatch, way: Way) -> Sizes | None:
    """What a kernel is compiled for; None where it cannot take the shapes, or does not fit on the GPU."""
    from lragent.kernels.sizes import Device, Shape, prefill_sizes, split_sizes

    heads, dim = query.shape[1:]
    rank_v, rank_k = (0 if low is None else low.shape[1] for low in (cache.low_v, cache.low_k))
    if dim % 8 or dim > MOST_DIMS or max(rank_v, rank_k) > MOST_RANK:
        return None
    shape = Shape(batch.most_new * (heads // cache.key.shape[0]), dim, rank_v, rank_k, query.element_size())
    return (split_sizes if way == "split" else prefill_sizes)(shape, Device.of(query.device))


def _expanded_pays(query: torch.Tensor, cache: LayerCache, spans: tuple[Span, ...]) -> bool:
    from lragent.kernels.expanded import CUDNN_DIMS, before_own, own_end

    heads, dim = query.shape[1:]
    if dim not in CUDNN_DIMS or query.dtype is torch.float32 or min(s.end - s.start for s in spans) < LEAST_EXPANDED:
        return False
    if torch.cuda.get_device_capability(query.device) < (8, 0):
        return False
    work = sum(4 * (s.end - s.start) * (s.context - (s.end - s.start) / 2) * heads * dim for s in spans)
    filled = sum(2 * (own_end(s) - before_own(s)) ** 2 + 4 * (s.end - s.start) * before_own(s) for s in spans)
    laid_out = {(s.row, s.role): s.context for s in spans}
    moved = sum(laid_out.values()) * cache.key.shape[0] * dim * 4 * query.element_size()
    expanded = filled * heads * dim / EXPANDED_RATE + moved / EXPAND_RATE + EXPAND_LAUNCHES * len(spans)
    return expanded + LEAST_SAVED < work / (KERNEL_RATE if cache.low_k is None else KERNEL_RATE_LOW_KEYS)


def make_plan(
    query: torch.Tensor, cache: LayerCache, batch: CachedBatch, *, window: int | None = None, way: Way | None = None
) -> Plan | None:
    """Divide a step's attention over the GPU, once for all layers; None where the way needs no plan.

    query: one layer's, for its shape. The plan holds the scratch of the step's attention: calls that share it must be
    on one stream. In a graph's capture it is remade at every replay, from what the batch's tensors then hold.
    """
    way = way or choose_way(query, cache, batch, window, None)
    if way not in ("split", "prefill") or not len(batch.context):
        return None
    from lragent.kernels.launch import padded
    from lragent.kernels.plan import Plan

    sizes = _kernel_sizes(query, cache, batch, way)
    if sizes is None:
        ranks = [low.shape[1] for low in (cache.low_v, cache.low_k) if low is not None]
        raise ValueError(f"query: heads of {query.shape[2]} with ranks {ranks} are not for this way; use way='torch'.")
    heads, dim = query.shape[1:]
    kv_heads = cache.key.shape[0]
    plan = Plan.empty(sizes, batch, heads, kv_heads, padded(dim), query.dtype)
    with _device_of(query):
        plan.make(batch, heads, kv_heads, window)
    return plan


def _device_of(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, whatever its arguments' is."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def cached_attention(
    query: torch.Tensor,
    cache: LayerCache,
    batch: CachedBatch,
    readers: Readers,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    plan: Plan | None = None,
    way: Way | None = None,
) -> torch.Tensor:
    """Flash-LoRA-Attention of a step's new tokens over their contexts in the cache.

    query: [T, Hq, D], rotated; whatever is new must be in the pools already. window: a query sees itself and the
    `window - 1` tokens before it. softcap: scores become `softcap * tanh(score / softcap)`. plan: from `make_plan` of
    the same batch; without one it is made anew. way: to overrule `choose_way`. Returns [T, Hq, D]; rows of no sequence
    are undefined. Raises ValueError naming the argument.
    """
    sizes = check_cached(query, cache, batch, readers)
    if not scale > 0:
        raise ValueError(f"scale: must be positive, not {scale}.")
    if window is not None and window < 1:
        raise ValueError(f"window: must be at least 1, not {window}.")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap: must be positive, not {softcap}.")
    if not sizes["T"] or not sizes["S"]:
        return torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if way is None and plan is not None:
        way = "split" if plan.sizes.programs else "prefill"
    elif way is None:
        way = choose_way(query, cache, batch, window, softcap)
    if way == "torch":
        return cached_attention_reference(
            query, cache, batch, readers, scale=scale, window=window, softcap=softcap
        ).to(query.dtype)  # fmt: skip
    if way == "expanded":
        from lragent.kernels.expanded import expanded_attention

        if not batch.spans or window is not None or softcap is not None:
            raise ValueError("way: 'expanded' needs batch.spans, and neither window nor softcap.")
        with _device_of(query):
            return expanded_attention(query, cache, batch, readers, batch.spans, scale)
    from lragent.kernels.launch import kernel_arguments
    from lragent.kernels.prefill import launch_prefill
    from lragent.kernels.split import launch_split

    plan = plan or make_plan(query, cache, batch, window=window, way=way)
    assert plan is not None
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    arguments = kernel_arguments(query, cache, batch, readers, scale, window, softcap)
    with _device_of(query):
        (launch_split if plan.sizes.programs else launch_prefill)(arguments, plan, out)
    return out


def plans_ahead(
    heads: int, kv_heads: int, dim: int, dtype: torch.dtype, device: torch.device, tokens: int, most_context: int
) -> list[Callable[[], None]]:
    """What cuDNN can plan before somebody waits for it: chunks of `tokens` in contexts up to `most_context`.

    Each call plans one shape. None where long chunks go another way.
    """
    if device.type != "cuda" or dtype is torch.float32 or torch.cuda.get_device_capability(device) < (8, 0):
        return []
    from lragent.kernels.expanded import CUDNN_DIMS, plan_shape, shapes_ahead

    if dim not in CUDNN_DIMS:
        return []
    shapes = shapes_ahead(tokens, most_context)
    return [partial(plan_shape, shape, heads, kv_heads, dim, dtype, device) for shape in shapes]


def write_cache(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    low_v: torch.Tensor | None,
    low_k: torch.Tensor | None,
    rope: tuple[torch.Tensor, torch.Tensor] | None,
    positions: torch.Tensor,
    base_slots: torch.Tensor,
    low_slots: torch.Tensor | None,
    cache: LayerCache,
    *,
    rotate_key: bool = True,
) -> None:
    """Rotate queries in place and keys, and write new tokens to their slots: `kernels.rotary_write`, which says more.

    query: [T, Hq, D]; key, value: [T, Hkv, D]; low_v, low_k: [T, r]; positions, base_slots, low_slots: [T] int32, a
    slot of -1 writes nothing. rope: None where query and key come rotated. Raises ValueError naming the argument.
    """
    from lragent.kernels.rotary_write import rotary_write, rotary_write_torch

    with _device_of(query):
        (rotary_write if query.is_cuda else rotary_write_torch)(
            query, key, value, low_v, low_k, rope, positions, base_slots, low_slots,
            cache.key, cache.value, cache.low_v, cache.low_k, rotate_key=rotate_key,
        )  # fmt: skip


def project(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    norm: tuple[torch.Tensor, float] | None = None,
    gated: bool = False,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """A linear layer with what stands around it: RMSNorm before, SiLU gating or the residual stream after.

    x: [T, d_in]; weight: [N, d_in]; bias: [N]; norm: its weight [d_in] and eps; gated: the first half of the outputs,
    through SiLU, times the second half; residual: [T, d_out], which is added and may be
    added to in place. Returns [T, N], or [T, N / 2] gated. Without gradients.
    """
    if x.is_cuda and x.dtype is not torch.float32:
        from lragent.kernels.skinny_linear import MOST_TOKENS, MOST_TOKENS_GATED, skinny_linear

        if 0 < len(x) <= (MOST_TOKENS_GATED if gated else MOST_TOKENS):
            if norm is not None and x.dtype is torch.float16 and len(x) > 1:
                x, norm = normalise(x, *norm), None  # else large channels would overflow before they are scaled
            with _device_of(x):
                return skinny_linear(x, weight, bias=bias, norm=norm, gated=gated, residual=residual)
    if norm is not None:
        x = normalise(x, *norm)
    if residual is not None and bias is None and not gated:
        return residual.addmm_(x, weight.T)
    out = F.linear(x, weight, bias)
    if gated:
        out = gate(out, len(weight) // 2)
    return out if residual is None else out + residual


def normalise(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm over the last dimension. x: [T, D] or [T, H, D]; weight: [D]."""
    if not x.is_cuda:
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    from lragent.kernels.rms_norm import rms_norm

    with _device_of(x):
        return rms_norm(x, weight, eps)


def gate(x: torch.Tensor, d: int) -> torch.Tensor:
    """`silu(gate) * up`. x: [T, >= 2 * d], gate in the first d columns, up in the next. Returns [T, d]."""
    if not x.is_cuda:
        return F.silu(x[:, :d]) * x[:, d : 2 * d]
    from lragent.kernels.silu_gate import silu_gate

    with _device_of(x):
        return silu_gate(x, d)


def add_role_up(
    out: torch.Tensor, low: torch.Tensor, up: torch.Tensor, roles: torch.Tensor, order: torch.Tensor | None = None
) -> torch.Tensor:
    """`out + low B` of each token's role. Without gradients `out` itself is added to.

    out: [T, d_out]; low: [T, r]; up: [n_roles, r, d_out]; roles: [T] int32, 0 = base; order: [T] int32 from
    `kernels.grouped_up.group_by_role`, which makes many roles faster. Raises ValueError naming the argument.
    """
    if torch.is_grad_enabled():
        return out + role_up(low, up, roles)
    if not out.is_cuda:
        return out.add_(role_up(low, up, roles))
    from lragent.kernels.grouped_up import grouped_up_

    with _device_of(out):
        return grouped_up_(out, low, up, roles, order)
