"""A stacked pack in a smaller rank: the best shared A for all roles together, by SVD.

At one module the roles' updates `s_j B_j A_j`, one under the other, are `C A` with the stacked A and `C = [s_j B_j]`.
The best approximation of rank K in the Frobenius norm keeps its first K singular directions: their right factor is the
new shared A, their left factor the new B. Everything is worked out in the small space of the ranks, in float64.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from lragent.adapter_set import AdapterSet, RoleSpec
from lragent.errors import UserError
from lragent.stacking import with_ranks


@dataclass(frozen=True)
class Compressed:
    """An ordinary tied set of at most the wanted rank, and what that cost."""

    adapters: AdapterSet
    errors: dict[str, float]
    """By module path: what is lost of all roles' updates together, as a share of their Frobenius norm."""

    @property
    def error(self) -> float:
        """The largest of all."""
        return max(self.errors.values())


def compress(adapters: AdapterSet, rank: int) -> Compressed:
    """Bring every module's shared A to at most `rank` rows. Exact (to rounding) where the sum of ranks is no larger.

    Every role may use all rows afterwards, and its scaling at each module stays. Raises UserError for a rank below 1.
    """
    if rank < 1:
        raise UserError(f"--rank: must be at least 1, not {rank}.")
    shared_a, role_b, errors = {}, {}, {}
    for path in adapters.module_paths:
        shared_a[path], scaled, errors[path] = _best(adapters.shared_a[path], adapters.scaled_b(path), rank)
        scaling = torch.tensor([_scaling(role, path) for role in adapters.roles], dtype=torch.float64)
        role_b[path] = (scaled / scaling[:, None, None]).to(adapters.dtype)
        shared_a[path] = shared_a[path].to(adapters.dtype)
    ranks = {path: a.shape[0] for path, a in shared_a.items()}
    smaller = dataclasses.replace(
        adapters,
        form="tied",
        roles=tuple(with_ranks(role, ranks, {p: _scaling(role, p) for p in ranks}) for role in adapters.roles),
        shared_a=shared_a,
        role_b=role_b,
    )
    return Compressed(smaller, errors)


def _best(a: Tensor, scaled: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """a: [r, d_in]; scaled: [n_roles, d_out, r]. Returns A [k, d_in], scaled B [n_roles, d_out, k] in float64, and the
    share that is lost."""
    roles, d_out, r = scaled.shape
    left_q, left_r = torch.linalg.qr(scaled.double().reshape(roles * d_out, r))
    right_q, right_r = torch.linalg.qr(a.double().T)  # [d_in, r], [r, r]
    u, values, vh = torch.linalg.svd(left_r @ right_r.T)
    k = min(rank, r)
    root = values[:k].sqrt()
    new_b = (left_q @ u[:, :k] * root).reshape(roles, d_out, k)
    new_a = root[:, None] * (vh[:k] @ right_q.T)
    total = float(values.square().sum())
    lost = float(values[k:].square().sum())
    return new_a, new_b, (lost / total) ** 0.5 if total else 0.0


def _scaling(role: RoleSpec, path: str) -> float:
    """A role's factor on B; 1 where it does not adapt the module, whose B is zero, or takes nothing from it."""
    return (role.scaling(path) if role.adapts(path) else 0.0) or 1.0
