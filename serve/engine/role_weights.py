"""A role's `B`, put into the place that the model's projections keep for it, while others are at work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lragent.adapter_set import AdapterSet
from lragent.errors import UserError
from lragent.role_linear import RoleLinear


@dataclass(frozen=True)
class PreparedRole:
    """A role that fits, on the model's device. up: [r, d_out] by module path, scaling folded in. root: its file."""

    name: str
    digest: str
    root: str
    up: Mapping[str, torch.Tensor]


class RoleWeights:
    """The adapted projections of one model."""

    def __init__(self, modules: Mapping[str, RoleLinear], fingerprint: str | None) -> None:
        """modules: by their paths in the model. fingerprint: of the base; None where nobody knows it."""
        self.fingerprint = fingerprint
        self._modules = modules

    def prepare(self, adapters: AdapterSet, role: str, *, name: str, root: str) -> PreparedRole:
        """`role` of `adapters` as `name`, in the form in which it is put into its place. Changes nothing.

        Raises UserError unless it was made for this base, adapts only modules that the served roles adapt, and all its
        rows of A are rows of the A that they share: else its answers, or others', would be wrong.
        """
        index = adapters.role_index(role)
        adapters.check_base(self.fingerprint)
        adapters.check_finite()
        spec, up = adapters.roles[index], {}
        for path, module in self._modules.items():
            up[path] = torch.zeros(module.up.shape[1:], dtype=module.up.dtype, device=module.up.device)
        for path in adapters.module_paths:
            if not spec.adapts(path):
                continue
            own = self._modules.get(path)
            if own is None:
                raise UserError(
                    f"{root}: the role adapts {path}, which no role of this server does; serve a pack with both."
                )
            start = self._rows(own, adapters.own_a(index, path), f"{root}: {path}")
            scaled = adapters.own_b(index, path).float() * spec.scaling(path)
            if scaled.shape[0] != own.up.shape[2]:
                raise UserError(f"{root}: the B at {path} has {scaled.shape[0]} rows, not {own.up.shape[2]}.")
            up[path][start : start + scaled.shape[1]] = scaled.T.to(own.up.device, own.up.dtype)
        return PreparedRole(name, adapters.role_digest(role), root, up)

    def put(self, place: int, role: PreparedRole) -> None:
        """From the next step on, tokens of `place` (from 1) are `role`'s."""
        for path, module in self._modules.items():
            module.up[place - 1].copy_(role.up[path], non_blocking=True)

    def clear(self, place: int) -> None:
        """Nobody is in `place` any more."""
        for module in self._modules.values():
            module.up[place - 1].zero_()

    @staticmethod
    def _rows(module: RoleLinear, a: torch.Tensor, where: str) -> int:
        """Where the rows `a` stand in the module's A."""
        down, rows = module.down, a.shape[0]
        if a.shape[1] != down.shape[1]:
            raise UserError(f"{where}: its A has {a.shape[1]} columns, not {down.shape[1]}: it is of another base.")
        if rows > down.shape[0]:
            raise UserError(
                f"{where}: its rank is {rows}, and the roles of this server share an A of rank {down.shape[0]}; "
                "pack them together (`lragent pack --stack`) and serve that."
            )
        a = a.to(down.device, down.dtype)
        for start in range(down.shape[0] - rows + 1):
            if torch.equal(down[start : start + rows], a):
                return start
        raise UserError(
            f"{where}: its A is not the one that the roles of this server share; train it with that A "
            "(`tying: frozen`), or pack them together (`lragent pack --stack`) and serve that."
        )
