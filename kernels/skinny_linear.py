"""Products of few tokens with large weights, as fast as the weights can be read.

A decode step's time is that of reading every weight once. What stands around a product costs little in arithmetic and
much in launches, so it is done by the same programs: the norm of what goes in (its scale is one number per token, which
is multiplied in at the end), SiLU gating of what comes out, and adding to the residual stream. On GPUs that can, a
program begins while the kernel before it ends, and fetches its first weights into the L2 cache before it waits for that
kernel's results.

Shapes, the same for all forms: x [T, d_in]; weight [N, d_in]; bias [N]; norm: (weight [d_in], eps) of an RMSNorm that x
passes first (several tokens are scaled after the product, where float16 may have overflown already); gated: the first
half of the N outputs, through SiLU, times the second half; residual [T, d_out], added. Returns [T, d_out] in the dtype
of x, d_out = N or, gated, N / 2. Sums are in float32 and rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from lragent.kernels.checks import FLOATS, Arguments
from lragent.kernels.launch import starts_early

Norm = tuple[torch.Tensor, float]
"""Weight [d_in] and eps of an RMSNorm."""

MOST_TOKENS, MOST_TOKENS_GATED = 32, 16
"""More tokens are faster by cuBLAS with kernels of their own around it (H100, Llama-3.1-8B's shapes)."""

PREFETCHED = 512
"""Columns of a program's weights that are fetched ahead."""


def skinny_linear_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    norm: Norm | None = None,
    gated: bool = False,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """The definition, in float32. See the module for shapes."""
    states = x.float()
    if norm is not None:
        states = states * torch.rsqrt(states.square().mean(-1, keepdim=True) + norm[1]) * norm[0].float()
    out = F.linear(states, weight.float(), None if bias is None else bias.float())
    if gated:
        gate, up = out.chunk(2, dim=-1)
        out = F.silu(gate) * up
    return out if residual is None else out + residual.float()


def skinny_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    norm: Norm | None = None,
    gated: bool = False,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """In one Triton launch, which can be captured in a CUDA graph. See the module for shapes.

    Raises ValueError naming the argument that does not fit.
    """
    arguments = Arguments(x.device)
    arguments.tensor("x", x, "T d_in", FLOATS)
    arguments.tensor("weight", weight, "N d_in", x.dtype)
    tokens, d_out = x.shape[0], weight.shape[0]
    if tokens > MOST_TOKENS:
        raise ValueError(f"x: at most {MOST_TOKENS} tokens, not {tokens}.")
    if gated:
        if d_out % 2:
            raise ValueError(f"weight: gated, its rows must be even in number, not {d_out}.")
        d_out //= 2
    if bias is not None:
        arguments.tensor("bias", bias, "N", x.dtype)
    if norm is not None:
        arguments.tensor("norm[0]", norm[0], "d_in", FLOATS)
    if residual is not None:
        arguments.tensor("residual", residual, f"T {d_out}", x.dtype)
    out = x.new_empty(tokens, d_out)
    if out.numel():
        _launch(x, weight, bias, norm, gated, residual, out)
    return out


@dataclass(frozen=True)
class _Sizes:
    """rows: of the weight, a program's. columns: that it takes at once."""

    rows: int
    columns: int
    warps: int
    stages: int

    def shared(self, tokens: int, itemsize: int, gated: bool) -> int:
        """Bytes of shared memory that the tensor cores' form takes."""
        return (self.rows * (1 + gated) + max(tokens, 16)) * self.columns * itemsize * self.stages


def _sizes(tokens: int, d_in: int, itemsize: int, normed: bool, gated: bool, device: torch.device) -> _Sizes:
    """What was fastest on an H100, made to fit into the device's shared memory."""
    if tokens == 1:
        wanted = _Sizes(4, 1024, 4, 1) if gated else _Sizes(4, 2048, 4, 3 if normed else 1)
        columns = min(wanted.columns, triton.next_power_of_2(d_in))
        while d_in % columns and columns > 512:  # rather than mask
            columns //= 2
        return replace(wanted, columns=columns)
    if gated:
        sizes = _Sizes(32, 256, 2, 3)
    elif normed:
        sizes = _Sizes(64, 256, 4, 3)
    else:
        sizes = _Sizes(16, 256, 2, 5)
    sizes = replace(sizes, columns=min(sizes.columns, max(16, triton.next_power_of_2(d_in))))
    limit = 1 << 20
    if device.type == "cuda":
        limit = torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]  # torch's stubs lack it
    while sizes.shared(triton.next_power_of_2(tokens), itemsize, gated) > limit - 2048 and sizes.columns > 16:
        if sizes.stages > 2:
            sizes = replace(sizes, stages=sizes.stages - 1)
        else:
            sizes = replace(sizes, columns=sizes.columns // 2)
    return sizes


def _ahead(d_in: int) -> int:
    """Columns to fetch ahead: a power of two of lines of 64, or none."""
    columns = PREFETCHED
    while columns > d_in:
        columns //= 2
    return columns if columns >= 64 else 0


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm: Norm | None,
    gated: bool,
    residual: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    tokens, d_in = x.shape
    d_out = out.shape[1]
    sizes = _sizes(tokens, d_in, x.element_size(), norm is not None, gated, x.device)
    early = starts_early(x.device)
    norm_weight, eps = (weight, 0.0) if norm is None else norm
    kernel = _one_token_kernel if tokens == 1 else _tokens_kernel
    kernel[(triton.cdiv(d_out, sizes.rows),)](
        x, weight, weight if bias is None else bias, norm_weight, out if residual is None else residual, out,
        tokens, d_out, weight.stride(0), x.stride(0), out.stride(0), 0 if residual is None else residual.stride(0), eps,
        D_IN=d_in, TOKENS=max(16, triton.next_power_of_2(tokens)), ROWS=sizes.rows, COLUMNS=sizes.columns,
        EVEN_ROWS=d_out % sizes.rows == 0, BIAS=bias is not None, NORM=norm is not None, GATED=gated,
        RESIDUAL=residual is not None, EARLY=early, AHEAD=_ahead(d_in) if early and x.element_size() == 2 else 0,
        STAGES=sizes.stages, PRECISION="ieee" if x.dtype is torch.float32 else "tf32",
        num_warps=sizes.warps, launch_pdl=early,
    )  # fmt: skip


@triton.jit
def _fetch_ahead(p_rows, AHEAD: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton takes the types from each launch
    """Ask for the first columns of rows of 16-bit weights to be brought into the L2 cache, 128 bytes at a time."""
    o_line = tl.arange(0, AHEAD // 64) * 64
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [(p_rows[:, None] + o_line[None, :]).to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _one_token_kernel(  # type: ignore[no-untyped-def]  # as above
    p_x, p_weight, p_bias, p_norm, p_residual, p_out, tokens, d_out, s_weight, s_x, s_out, s_residual, eps,
    D_IN: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EVEN_ROWS: tl.constexpr,
    BIAS: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr, EARLY: tl.constexpr,
    AHEAD: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """ROWS outputs of one token. Sums stay spread over the columns of a block until the end."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    o_n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # [RO]
    o_c = tl.arange(0, COLUMNS)  # [CO]
    EVEN: tl.constexpr = EVEN_ROWS and D_IN % COLUMNS == 0
    p_rows = p_weight + o_n.to(tl.int64) * s_weight
    p_others = p_rows + d_out.to(tl.int64) * s_weight  # gated: the rows that the gates are multiplied with
    if AHEAD > 0 and EVEN_ROWS:
        _fetch_ahead(p_rows, AHEAD)
        if GATED:
            _fetch_ahead(p_others, AHEAD)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    others = tl.zeros([ROWS, COLUMNS], tl.float32)
    squares = tl.zeros([COLUMNS], tl.float32)
    for column in tl.range(0, D_IN, COLUMNS, num_stages=STAGES):
        there = None if EVEN else (column + o_c < D_IN)
        b_x = tl.load(p_x + column + o_c, mask=there, other=None if EVEN else 0.0).to(tl.float32)
        m_w = None if EVEN else (o_n < d_out)[:, None] & (column + o_c < D_IN)[None, :]
        if NORM:
            squares += b_x * b_x
            b_x *= tl.load(p_norm + column + o_c, mask=there, other=None if EVEN else 0.0).to(tl.float32)
        b_w = tl.load(p_rows[:, None] + column + o_c[None, :], mask=m_w, other=None if EVEN else 0.0)
        sums += b_w.to(tl.float32) * b_x[None, :]
        if GATED:
            b_w = tl.load(p_others[:, None] + column + o_c[None, :], mask=m_w, other=None if EVEN else 0.0)
            others += b_w.to(tl.float32) * b_x[None, :]
    m_n = o_n < d_out
    scale = 1.0
    if NORM:
        scale = tl.rsqrt(tl.sum(squares, 0) / D_IN + eps)
    out = tl.sum(sums, 1) * scale
    if BIAS:
        out += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)
    if GATED:
        other = tl.sum(others, 1) * scale
        if BIAS:
            other += tl.load(p_bias + d_out + o_n, mask=m_n, other=0.0).to(tl.float32)
        out = out * tl.sigmoid(out) * other
    if RESIDUAL:
        out += tl.load(p_residual + o_n, mask=m_n, other=0.0).to(tl.float32)
    tl.store(p_out + o_n, out.to(p_out.dtype.element_ty), mask=m_n)


@triton.jit
def _tokens_kernel(  # type: ignore[no-untyped-def]  # as above
    p_x, p_weight, p_bias, p_norm, p_residual, p_out, tokens, d_out, s_weight, s_x, s_out, s_residual, eps,
    D_IN: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EVEN_ROWS: tl.constexpr,
    BIAS: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr, EARLY: tl.constexpr,
    AHEAD: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """ROWS outputs of up to TOKENS tokens, by the tensor cores: weights stand where rows of queries usually do."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    o_n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # [RO]
    o_c = tl.arange(0, COLUMNS)  # [CO]
    o_t = tl.arange(0, TOKENS)  # [TO]
    m_n, m_t = o_n < d_out, o_t < tokens
    EVEN: tl.constexpr = D_IN % COLUMNS == 0
    p_rows = p_weight + o_n.to(tl.int64) * s_weight
    p_others = p_rows + d_out.to(tl.int64) * s_weight
    if AHEAD > 0 and EVEN_ROWS:
        _fetch_ahead(p_rows, AHEAD)
        if GATED:
            _fetch_ahead(p_others, AHEAD)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    sums = tl.zeros([ROWS, TOKENS], tl.float32)
    others = tl.zeros([ROWS, TOKENS], tl.float32)
    squares = tl.zeros([TOKENS], tl.float32)
    for column in tl.range(0, D_IN, COLUMNS, num_stages=STAGES):
        m_x = m_t[None, :] if EVEN else m_t[None, :] & (column + o_c < D_IN)[:, None]
        m_w = m_n[:, None] if EVEN else m_n[:, None] & (column + o_c < D_IN)[None, :]
        b_w = tl.load(p_rows[:, None] + column + o_c[None, :], mask=m_w, other=0.0)  # [RO, CO]
        b_x = tl.load(p_x + o_t[None, :] * s_x + column + o_c[:, None], mask=m_x, other=0.0)  # [CO, TO]
        if NORM:
            wide = b_x.to(tl.float32)
            squares += tl.sum(wide * wide, 0)
            b_norm = tl.load(
                p_norm + column + o_c, mask=None if EVEN else column + o_c < D_IN, other=None if EVEN else 0.0
            )
            b_x = (wide * b_norm.to(tl.float32)[:, None]).to(b_x.dtype)
        sums = tl.dot(b_w, b_x, sums, input_precision=PRECISION)
        if GATED:
            b_w = tl.load(p_others[:, None] + column + o_c[None, :], mask=m_w, other=0.0)
            others = tl.dot(b_w, b_x, others, input_precision=PRECISION)
    out = sums
    scale = squares
    if NORM:
        scale = tl.rsqrt(squares / D_IN + eps)
        out *= scale[None, :]
    if BIAS:
        out += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)[:, None]
    if GATED:
        if NORM:
            others *= scale[None, :]
        if BIAS:
            others += tl.load(p_bias + d_out + o_n, mask=m_n, other=0.0).to(tl.float32)[:, None]
        out = out * tl.sigmoid(out) * others
    m_out = m_n[:, None] & m_t[None, :]
    if RESIDUAL:
        p_res = p_residual + o_t[None, :] * s_residual + o_n[:, None]
        out += tl.load(p_res, mask=m_out, other=0.0).to(tl.float32)
    tl.store(p_out + o_t[None, :] * s_out + o_n[:, None], out.to(p_out.dtype.element_ty), mask=m_out)
