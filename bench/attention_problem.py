"""Attention over decomposed values as a benchmark's problem, and its answer in float32 with every gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from lragent.kernels.attention import visible
from lragent.kernels.low_rank import role_up_heads

HEADS, KV_HEADS, DIM, N_ROLES = 32, 8, 128, 3
"""Llama-3.1-8B's, and the roles of its team."""


@dataclass(eq=False)
class Problem:
    """query [Hq, T, D], key, value [Hkv, T, D], low [T, r], which want gradients; up [n_roles, r, Hkv * D]; roles [T].

    grad [T, Hq, D] is that of the result. low_grad [T, Hq, r], that of `P LR`, is what it becomes behind the readers'
    `B`, so that all contenders have the same gradients.
    """

    spans: tuple[tuple[int, int], ...]
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    low: torch.Tensor
    up: torch.Tensor
    roles: torch.Tensor
    grad: torch.Tensor
    low_grad: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        heads, kv_heads = self.query.shape[0], self.key.shape[0]
        own = self.up.float().view(len(self.up), -1, kv_heads, self.query.shape[2])
        own = torch.cat((torch.zeros_like(own[:1]), own))[self.roles]  # [T, r, Hkv, D]
        grad = self.grad.float().unflatten(1, (kv_heads, heads // kv_heads))
        self.low_grad = torch.einsum("tkgd,trkd->tkgr", grad, own).flatten(1, 2).to(self.grad.dtype)

    @classmethod
    def of(
        cls,
        lengths: Sequence[int],
        rank: int,
        device: torch.device,
        dtype: torch.dtype = torch.bfloat16,
        shape: tuple[int, int, int] = (HEADS, KV_HEADS, DIM),
    ) -> Problem:
        """Random, the same for the same arguments; laid out as projections leave it."""
        made = torch.Generator(device).manual_seed(0)
        tokens, (query_heads, kv_heads, dim) = sum(lengths), shape

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=made, device=device, dtype=torch.float32).to(dtype)

        query, key, value = (random(tokens, heads, dim).transpose(0, 1) for heads in (query_heads, kv_heads, kv_heads))
        ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
        roles = torch.randint(1, N_ROLES + 1, (tokens,), generator=made, device=device)
        return cls(
            tuple((end - length, end) for end, length in zip(ends, lengths, strict=True)),
            query.requires_grad_(), key.requires_grad_(), value.requires_grad_(),
            random(tokens, rank).requires_grad_(), random(N_ROLES, rank, kv_heads * dim) / rank, roles,
            random(tokens, query_heads, dim),
        )  # fmt: skip

    @property
    def scale(self) -> float:
        """Of the scores."""
        return float(self.query.shape[2] ** -0.5)

    @property
    def inputs(self) -> list[torch.Tensor]:
        """What wants gradients."""
        return [self.query, self.key, self.value, self.low]

    def add_up(self, out: torch.Tensor, low_out: torch.Tensor) -> torch.Tensor:
        """out [T, Hq, D] and low_out [T, Hq, r] to what the readers see."""
        kv_heads = self.key.shape[0]
        low_out = low_out.transpose(0, 1).unflatten(0, (kv_heads, -1))
        added = role_up_heads(low_out, self.up.to(low_out.dtype), self.roles)
        return out + added.flatten(0, 1).transpose(0, 1)

    def operations(self, gradients: bool) -> float:
        """Floating-point operations of attention without LR: two products forward, five backward, half of each."""
        squares = sum((end - start) ** 2 for start, end in self.spans)
        return 2.0 * self.query.shape[0] * self.query.shape[2] * squares * (7 if gradients else 2) / 2


@dataclass(frozen=True)
class Exact:
    """In float32: `P V` [T, Hq, D], `P LR` [T, Hq, r], and the gradients with the LR part and without."""

    out: torch.Tensor
    low_out: torch.Tensor
    with_low: list[torch.Tensor]
    plain: list[torch.Tensor]


def exact(problem: Problem) -> Exact:
    """Head by head, from the definition."""
    query, key, value, low = (x.detach().float() for x in problem.inputs)
    grad, low_grad = problem.grad.float(), problem.low_grad.float()
    out, low_out = torch.empty_like(grad), torch.empty_like(low_grad)
    with_low, plain = ([torch.zeros_like(x) for x in (query, key, value, low)] for _ in range(2))
    for start, end in problem.spans:
        hidden = ~visible(end - start, end - start, query.device, None, None)
        for head in range(query.shape[0]):
            kv = head * key.shape[0] // query.shape[0]
            part = [query[head, start:end], key[kv, start:end], value[kv, start:end], low[start:end]]
            q, k, v, lr = (x.detach().requires_grad_() for x in part)
            weights = (q @ k.T * problem.scale).masked_fill(hidden, float("-inf")).softmax(-1)
            mine = (weights @ v, weights @ lr)
            given = (grad[start:end, head], low_grad[start:end, head])
            out[start:end, head], low_out[start:end, head] = (x.detach() for x in mine)
            for sums, ends in ((plain, 1), (with_low, 2)):
                found = torch.autograd.grad(
                    mine[:ends], (q, k, v, lr), given[:ends], retain_graph=True, allow_unused=True
                )
                places = (sums[0][head], sums[1][kv], sums[2][kv], sums[3])
                for place, x in zip(places, found, strict=True):
                    if x is not None:
                        place[start:end] += x
    return Exact(out, low_out, with_low, plain)
