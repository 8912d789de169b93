"""The up-projection `B` for tokens of many roles, added in place: a grouped product that reads only the roles present.

`low_rank.role_up` multiplies every token with every role's `B` and is best for a handful of roles; here the work grows
with the roles that a block of tokens holds, of however many are loaded.

Shapes, the same for all three forms below:
out [T, d_out], to which `low @ up[role - 1]` is added and which is returned; low [T, r]; up [n_roles, r, d_out], each
role's `B` transposed, its scaling folded in, without Inf or NaN. roles [T] int32 in 0..n_roles; a token of role 0 is
left as it is, whatever its `low`.
order [T] int32: a permutation of the tokens, by `group_by_role`, which puts those of one role side by side; it changes
the speed, not the result. Every dimension but the last may have any stride.

Sums are in float32 and rounded once, to the dtype of `out`.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from lragent.kernels.checks import FLOATS, MOST_RANK_COPIED, Arguments, check_rank
from lragent.kernels.launch import starts_early


def each_alone(tokens: int, n_roles: int) -> bool:
    """Whether each token reads its own `B`, rather than blocks of 16 tokens all that they need between them.

    On an H100 the first takes 0.15 µs for each token, the second 0.3 µs for each role of a block, and 0.4 µs more to
    begin with (d_out 4096, ranks 8 and 16; `python -m lragent.bench kernels`).
    """
    return tokens <= 2.5 + 2 * min(tokens, n_roles, 16)


def group_by_role(roles: torch.Tensor) -> torch.Tensor:
    """The order [T] int32 that puts tokens of one role side by side: one for all layers of a step.

    roles: [T] int32. Made on the roles' device without waiting for it.
    """
    return torch.sort(roles, stable=True).indices.to(torch.int32)


def grouped_up_reference_(
    out: torch.Tensor, low: torch.Tensor, up: torch.Tensor, roles: torch.Tensor, order: torch.Tensor | None = None
) -> torch.Tensor:
    """The definition, token by token in float32. See the module for shapes."""
    for token, role in enumerate(roles.tolist()):
        if role > 0:
            out[token] = out[token].float() + low[token].float() @ up[role - 1].float()
    return out


def grouped_up_torch_(
    out: torch.Tensor, low: torch.Tensor, up: torch.Tensor, roles: torch.Tensor, order: torch.Tensor | None = None
) -> torch.Tensor:
    """The same in plain torch, a product per role, for any device; on CUDA it waits for the device.

    See the module for shapes. Raises ValueError naming the argument that does not fit.
    """
    _check(out, low, up, roles, order)
    for role in roles.unique().tolist():
        if role > 0:
            tokens = torch.nonzero(roles == role).squeeze(1)
            out[tokens] = torch.addmm(out[tokens].float(), low[tokens].float(), up[role - 1].float()).to(out.dtype)
    return out


def grouped_up_(
    out: torch.Tensor, low: torch.Tensor, up: torch.Tensor, roles: torch.Tensor, order: torch.Tensor | None = None
) -> torch.Tensor:
    """The same in one Triton launch, which does not wait for the device and can be captured in a CUDA graph.

    See the module for shapes. Raises ValueError naming the argument that does not fit; roles and order are on the
    device and are not looked at, and numbers outside their ranges read and write where they should not.
    """
    _check(out, low, up, roles, order)
    if out.numel():
        _launch(out, low, up, roles, order)
    return out


def _check(
    out: torch.Tensor, low: torch.Tensor, up: torch.Tensor, roles: torch.Tensor, order: torch.Tensor | None
) -> None:
    arguments = Arguments(out.device)
    arguments.tensor("out", out, "T d_out", FLOATS)
    arguments.tensor("low", low, "T r", FLOATS)
    check_rank("low", arguments["r"], MOST_RANK_COPIED)
    arguments.tensor("up", up, "n_roles r d_out", low.dtype)
    arguments.tensor("roles", roles, "T", torch.int32)
    if order is not None:
        arguments.tensor("order", order, "T", torch.int32)


def _blocks(tokens: int, rank: int, d_out: int, dtype: torch.dtype) -> dict[str, int]:
    """Sizes of the blocks for the product by roles.

    Few tokens: small blocks, so that there are programs for all processors. Many: blocks of 64 tokens fill Hopper's
    tensor cores; the time is that of reading and writing `out`, so nothing is gained by larger ones. Where columns are
    read one by one (d_out is no multiple of 16) or multiplied without tensor cores (float32), large blocks would not
    fit into registers.
    """
    block_r = min(max(triton.next_power_of_2(rank), 16), 64)  # 16 is the least that tensor cores multiply
    if dtype == torch.float32:
        return {"BLOCK_T": 16, "BLOCK_D": 64, "BLOCK_R": min(block_r, 32), "num_warps": 4, "num_stages": 2}
    block_t = 16 if tokens <= 512 or d_out % 16 else 64
    return {"BLOCK_T": block_t, "BLOCK_D": 128, "BLOCK_R": block_r, "num_warps": 4, "num_stages": 2}


def _launch(
    out: torch.Tensor, low: torch.Tensor, up: torch.Tensor, roles: torch.Tensor, order: torch.Tensor | None
) -> None:
    tokens, d_out = out.shape
    rank = low.shape[1]
    assert low.shape[0] == roles.shape[0] == tokens
    assert up.shape[1:] == (rank, d_out)
    assert roles.is_contiguous()
    assert order is None or order.is_contiguous()
    early = starts_early(out.device)
    if each_alone(tokens, up.shape[0]):
        block_d = 128
        _each_alone_kernel[(tokens, triton.cdiv(d_out, block_d))](
            out, low, up, roles, out.stride(0), low.stride(0), up.stride(0), up.stride(1), d_out,
            RANK=rank, BLOCK_R=min(triton.next_power_of_2(rank), 32), BLOCK_D=block_d, EARLY=early, num_warps=4,
            launch_pdl=early,
        )  # fmt: skip
        return
    blocks = _blocks(tokens, rank, d_out, low.dtype)
    # Triton sees of a stride whether it is a multiple of 16. Rows of a fused projection's output are often multiples of
    # 8 only, which is enough to read 16 bytes at a time, but must be told.
    out_unit, low_unit = math.gcd(out.stride(0), 8), math.gcd(low.stride(0), 8)
    _by_roles_kernel[(triton.cdiv(tokens, blocks["BLOCK_T"]), triton.cdiv(d_out, blocks["BLOCK_D"]))](
        out, low, up, roles, order, out.stride(0) // out_unit, low.stride(0) // low_unit, up.stride(0), up.stride(1),
        tokens, d_out, RANK=rank, OUT_UNIT=out_unit, LOW_UNIT=low_unit, EARLY=early, launch_pdl=early, **blocks,
    )  # fmt: skip


@triton.jit
def _each_alone_kernel(  # type: ignore[no-untyped-def]  # Triton takes the types of parameters from each launch
    p_out, p_low, p_up, p_roles, s_out, s_low, s_up_role, s_up_r, d_out,
    RANK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program: one token and BLOCK_D columns. `s_` is a stride."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BD]
    m_d = o_d < d_out
    role = tl.load(p_roles + token)
    if role > 0:
        b_out = tl.load(p_out + token * s_out + o_d, mask=m_d).to(tl.float32)
        p_role = p_up + (role - 1).to(tl.int64) * s_up_role
        b_sum = tl.zeros([BLOCK_D], tl.float32)
        for r in range(0, RANK, BLOCK_R):
            o_r = r + tl.arange(0, BLOCK_R)  # [BR]
            m_r = o_r < RANK
            b_low = tl.load(p_low + token * s_low + o_r, mask=m_r, other=0.0).to(tl.float32)
            b_up = tl.load(
                p_role + o_r[:, None] * s_up_r + o_d[None, :], mask=m_r[:, None] & m_d[None, :], other=0.0
            )  # [BR, BD]
            b_sum += tl.sum(b_low[:, None] * b_up.to(tl.float32), axis=0)
        tl.store(p_out + token * s_out + o_d, (b_out + b_sum).to(p_out.dtype.element_ty), mask=m_d)


@triton.jit(do_not_specialize=["s_out", "s_low", "tokens"])  # one compilation for all: the units say what matters
def _by_roles_kernel(  # type: ignore[no-untyped-def]  # as above
    p_out, p_low, p_up, p_roles, p_order, s_out, s_low, s_up_role, s_up_r, tokens, d_out,
    RANK: tl.constexpr, OUT_UNIT: tl.constexpr, LOW_UNIT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_T tokens and BLOCK_D columns, and a product for each role that these tokens have.

    A product's rows of other roles are zeros, so that all products add up to the tokens' own. `s_out` and `s_low` count
    in units of OUT_UNIT and LOW_UNIT.
    """
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    NONE: tl.constexpr = 2147483647
    o_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)  # [BT]
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BD]
    m_t = o_t < tokens
    m_d = o_d < d_out
    if p_order is not None:
        o_t = tl.load(p_order + o_t, mask=m_t, other=0)
    b_roles = tl.load(p_roles + o_t, mask=m_t, other=0)  # [BT]
    o_row = o_t.to(tl.int64)[:, None]
    m_out = (b_roles > 0)[:, None] & m_d[None, :]
    p_o = p_out + o_row * s_out * OUT_UNIT + o_d[None, :]  # [BT, BD]
    b_out = tl.load(p_o, mask=m_out)
    b_sum = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    role = tl.min(tl.where(b_roles > 0, b_roles, NONE))  # the least
    while role != NONE:
        p_role = p_up + (role - 1).to(tl.int64) * s_up_role
        m_role = b_roles == role
        for r in range(0, RANK, BLOCK_R):
            o_r = r + tl.arange(0, BLOCK_R)  # [BR]
            m_r = o_r < RANK
            b_low = tl.load(
                p_low + o_row * s_low * LOW_UNIT + o_r[None, :], mask=m_role[:, None] & m_r[None, :], other=0.0
            )  # [BT, BR]
            b_up = tl.load(
                p_role + o_r[:, None] * s_up_r + o_d[None, :], mask=m_r[:, None] & m_d[None, :], other=0.0
            )  # [BR, BD]
            b_sum = tl.dot(b_low, b_up, b_sum, input_precision="ieee")
        role = tl.min(tl.where(b_roles > role, b_roles, NONE))  # the next that is present
    tl.store(p_o, (b_out.to(tl.float32) + b_sum).to(p_out.dtype.element_ty), mask=m_out)
