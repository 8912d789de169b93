"""The roles of one team in memory: the image of a pack, and what training, serving and the PEFT bridge exchange.

Matrices are kept *unscaled*, bit for bit as they were trained or imported; whoever applies them multiplies `B` by the
role's own scaling (`AdapterSet.scaled_b`).

A module path is a module's name in the transformers model (`model.named_modules()`), for example
`model.layers.0.self_attn.q_proj`. Its last part, `q_proj`, is its target.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from lragent.errors import UserError

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear modules of a decoder layer that roles may adapt."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""What adapter weights may be stored in."""

Form = Literal["tied", "stacked"]
Objective = Literal["shared", "per_role", "mixed"]
PrefixWriterName = Literal["base", "first"]

_ROLE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


class UnknownBaseWarning(UserWarning):
    """Adapters that do not say which base they were made for are taken on trust."""


def check_role_name(name: str) -> None:
    """Raise `UserError` unless `name` can name a role: it becomes a folder, a PEFT adapter and a model id."""
    if name == "base":
        raise UserError('a role cannot be named "base": that name means the model without an adapter; rename the role')
    if not _ROLE_NAME.fullmatch(name):
        raise UserError(
            f"the role name {name!r} is not allowed: use 1 to 64 letters, digits, '_' or '-', "
            "beginning with a letter or digit"
        )


def natural_key(path: str) -> list[tuple[int, int, str]]:
    """Sort key under which `layers.2` comes before `layers.10`."""
    return [(0, len(s), s) if s.isdecimal() else (1, 0, s) for s in re.split(r"(\d+)", path)]


@dataclass(frozen=True)
class RoleSpec:
    """What a role is besides its matrices."""

    name: str
    alpha: float
    rank: int
    """The role's own rank; in a stacked set smaller than the rank of the shared A."""
    rslora: bool = False
    """Scale by `alpha / sqrt(rank)` instead of `alpha / rank`."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Ranks that differ from `rank`, by full module path."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    """Alphas that differ from `alpha`, by full module path."""
    rows: Mapping[str, tuple[int, int]] | None = None
    """Stacked sets only: by module path, the half-open range of rows of A that is this role's own. A module that is
    not named here is not adapted by this role."""

    def adapts(self, module_path: str) -> bool:
        """Whether the role changes this module, given that its set targets it."""
        return self.rows is None or module_path in self.rows

    def rank_of(self, module_path: str) -> int:
        """The role's own rank at this module."""
        return self.rank_pattern.get(module_path, self.rank)

    def alpha_of(self, module_path: str) -> float:
        """The role's alpha at this module."""
        return self.alpha_pattern.get(module_path, self.alpha)

    def scaling(self, module_path: str) -> float:
        """The factor on `B`: alpha / rank, or alpha / sqrt(rank) under rank-stabilised LoRA."""
        rank = self.rank_of(module_path)
        return self.alpha_of(module_path) / (math.sqrt(rank) if self.rslora else rank)


@dataclass(frozen=True)
class AdapterSet:
    """All roles of a team over one base model.

    Validated when made: `UserError` says in one sentence what does not fit. Finiteness is checked where files are
    read and written (`check_finite`), since it reads every number.
    """

    base_model: str
    """Name of the base model, for people."""
    base_fingerprint: str | None
    """What the adapters were made for (`lragent.models.fingerprint`); None where nobody recorded it."""
    form: Form
    """`tied`: one A that all roles trained with. `stacked`: independent adapters, each with its own rows of A."""
    targets: tuple[str, ...]
    """Last names of the adapted modules, for example ("q_proj", "v_proj")."""
    roles: tuple[RoleSpec, ...]
    shared_a: Mapping[str, Tensor]
    """By module path: [r, d_in]. `r` may differ between modules (rank patterns, stacking)."""
    role_b: Mapping[str, Tensor]
    """By module path: [n_roles, d_out, r], unscaled, in the order of `roles`."""
    objective: Objective | None = None
    """What the roles were trained for; None for imported adapters."""
    prefix_writer: PrefixWriterName | None = None
    """Who wrote the positions before the first authored token in training; None for imported adapters."""

    def __post_init__(self) -> None:
        self.validate()

    # -- roles ---------------------------------------------------------------------------------------------------

    @property
    def role_names(self) -> tuple[str, ...]:
        return tuple(role.name for role in self.roles)

    def role_index(self, name: str) -> int:
        """Where role `name` lies in `roles` and in the first dimension of `role_b`.

        Raises `UserError` naming the roles there are.
        """
        for i, role in enumerate(self.roles):
            if role.name == name:
                return i
        raise UserError(f"there is no role {name!r} here; the roles are {', '.join(self.role_names)}")

    # -- matrices ------------------------------------------------------------------------------------------------

    @property
    def module_paths(self) -> tuple[str, ...]:
        """The adapted modules, in the order of `shared_a`."""
        return tuple(self.shared_a)

    @property
    def dtype(self) -> torch.dtype:
        """The one dtype of all matrices."""
        return next(iter(self.shared_a.values())).dtype

    def rank(self, module_path: str) -> int:
        """Rank of the shared A at this module."""
        return self.shared_a[module_path].shape[0]

    def scaled_b(self, module_path: str) -> Tensor:
        """`s_j B_j` of every role, [n_roles, d_out, r] float32; zero for roles that do not adapt the module."""
        b = self.role_b[module_path]
        scaling = [role.scaling(module_path) if role.adapts(module_path) else 0.0 for role in self.roles]
        return b.float() * torch.tensor(scaling, dtype=torch.float32, device=b.device)[:, None, None]

    def own_a(self, index: int, module_path: str) -> Tensor:
        """The rows of A that role `index` uses, [role rank, d_in]; raises `KeyError` where it does not adapt it."""
        rows = self.roles[index].rows
        a = self.shared_a[module_path]
        return a if rows is None else a[slice(*rows[module_path])]

    def own_b(self, index: int, module_path: str) -> Tensor:
        """The columns of B that role `index` uses, [d_out, role rank], unscaled; the counterpart of `own_a`."""
        rows = self.roles[index].rows
        b = self.role_b[module_path][index]
        return b if rows is None else b[:, slice(*rows[module_path])]

    def nbytes(self) -> int:
        """Bytes of all matrices."""
        return sum(t.numel() * t.element_size() for t in (*self.shared_a.values(), *self.role_b.values()))

    def separate_nbytes(self) -> int:
        """Bytes that the same roles take as separate adapters, each with its own copy of its A."""
        return sum(
            t.numel() * t.element_size()
            for i, role in enumerate(self.roles)
            for path in self.module_paths
            if role.adapts(path)
            for t in (self.own_a(i, path), self.own_b(i, path))
        )

    # -- identity ------------------------------------------------------------------------------------------------

    def role_digest(self, name: str) -> str:
        """Content digest of one role, hex SHA-256: what a cache entry written by this role depends on.

        Covers the base fingerprint, the modules adapted, the role's own A and B bit for bit, and its scaling. Neither
        its name nor any other role enters, so an adapter keeps its digest when it is renamed or stacked with others.
        """
        index = self.role_index(name)
        role = self.roles[index]
        digest = hashlib.sha256()
        _add_json(digest, ["lragent role", self.base_fingerprint])
        for path in sorted(p for p in self.module_paths if role.adapts(p)):
            _add_json(digest, [path, role.scaling(path).hex()])
            _add_tensor(digest, self.own_a(index, path))
            _add_tensor(digest, self.own_b(index, path))
        return digest.hexdigest()

    def a_digest(self) -> str:
        """Content digest of the whole shared A and the base fingerprint, hex SHA-256: the identity of an LR cache."""
        digest = hashlib.sha256()
        _add_json(digest, ["lragent shared A", self.base_fingerprint])
        for path in sorted(self.module_paths):
            _add_json(digest, path)
            _add_tensor(digest, self.shared_a[path])
        return digest.hexdigest()

    # -- validity ------------------------------------------------------------------------------------------------

    def validate(self) -> None:
        """Raise `UserError` unless names, modules, shapes, ranks and row ranges fit together."""
        self._validate_names()
        if not self.shared_a:
            raise UserError("an adapter set needs at least one adapted module")
        if missing := sorted(set(self.shared_a) ^ set(self.role_b)):
            raise UserError(f"module {missing[0]!r} has a shared A without role B, or the reverse")
        found = {path.rpartition(".")[2] for path in self.shared_a}
        if found != set(self.targets) or len(set(self.targets)) != len(self.targets):
            raise UserError(
                f"the targets {', '.join(self.targets) or '(none)'} do not agree with the adapted modules, "
                f"which are {', '.join(sorted(found))}"
            )
        for path in self.shared_a:
            self._validate_module(path)
        for role in self.roles:
            self._validate_role(role)

    def check_finite(self) -> None:
        """Raise `UserError` naming the first matrix that holds a NaN or an infinity."""
        for path in self.module_paths:
            if not torch.isfinite(self.shared_a[path]).all():
                raise UserError(f"the shared A of {path} holds NaN or Inf")
            for i, role in enumerate(self.roles):
                if not torch.isfinite(self.role_b[path][i]).all():
                    raise UserError(f"the B of role {role.name!r} at {path} holds NaN or Inf")

    def check_base(self, expect_fingerprint: str | None) -> None:
        """Raise `UserError` where the adapters were made for another base than the one with this fingerprint.

        Adapters without a fingerprint are taken with an `UnknownBaseWarning`; None expects nothing.
        """
        if expect_fingerprint is None or self.base_fingerprint == expect_fingerprint:
            return
        if self.base_fingerprint is None:
            warnings.warn(
                f"the adapters of {', '.join(self.role_names)} do not record the base that they were made for "
                f"(it is called {self.base_model!r}); they are used on trust",
                UnknownBaseWarning,
                stacklevel=2,
            )
            return
        raise UserError(
            f"the adapters were made for another base, {self.base_model!r} with fingerprint "
            f"{self.base_fingerprint[:12]}…, and this base has {expect_fingerprint[:12]}…; load that base"
        )

    def _validate_names(self) -> None:
        if not self.roles:
            raise UserError("an adapter set needs at least one role")
        for i, name in enumerate(self.role_names):
            check_role_name(name)
            if name in self.role_names[:i]:
                raise UserError(f"the role name {name!r} is used twice; every role needs a name of its own")
        if self.form not in get_args(Form):
            raise UserError(f"form is {self.form!r}; it must be tied or stacked")
        if self.objective is not None and self.objective not in get_args(Objective):
            raise UserError(f"objective is {self.objective!r}; it must be shared, per_role or mixed")
        if self.prefix_writer is not None and self.prefix_writer not in get_args(PrefixWriterName):
            raise UserError(f"prefix_writer is {self.prefix_writer!r}; it must be base or first")
        for target in self.targets:
            if target not in TARGETS:
                raise UserError(f"target {target!r} cannot be adapted; the targets are {', '.join(TARGETS)}")

    def _validate_module(self, path: str) -> None:
        a, b = self.shared_a[path], self.role_b[path]
        if a.dim() != 2 or b.dim() != 3 or 0 in a.shape or 0 in b.shape:
            raise UserError(
                f"module {path!r} has a shared A of shape {list(a.shape)} and role B of shape {list(b.shape)}; "
                "[r, d_in] and [n_roles, d_out, r] are expected"
            )
        if b.shape[0] != len(self.roles) or b.shape[2] != a.shape[0]:
            raise UserError(
                f"role B of module {path!r} has shape {list(b.shape)}; "
                f"[{len(self.roles)} roles, d_out, rank {a.shape[0]}] is expected"
            )
        if a.dtype not in DTYPES or a.dtype != self.dtype or b.dtype != self.dtype:
            raise UserError(
                f"module {path!r} holds {a.dtype} and {b.dtype}; all matrices must have one dtype of "
                + ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
            )

    def _validate_role(self, role: RoleSpec) -> None:
        if role.rank < 1 or any(r < 1 for r in role.rank_pattern.values()):
            raise UserError(f"role {role.name!r} has a rank below 1")
        if not all(math.isfinite(a) for a in (role.alpha, *role.alpha_pattern.values())):
            raise UserError(f"role {role.name!r} has an alpha that is not a finite number")
        if unknown := sorted((set(role.rank_pattern) | set(role.alpha_pattern)) - set(self.shared_a)):
            raise UserError(f"role {role.name!r} has a rank or alpha for {unknown[0]!r}, which is not adapted")
        if (role.rows is None) != (self.form == "tied"):
            raise UserError(f"role {role.name!r}: rows of A belong to stacked sets, and only to those")
        if role.rows is None:
            for path, a in self.shared_a.items():
                if role.rank_of(path) != a.shape[0]:
                    raise UserError(
                        f"role {role.name!r} has rank {role.rank_of(path)} at {path}, the shared A has {a.shape[0]}"
                    )
            return
        if not role.rows:
            raise UserError(f"role {role.name!r} adapts no module")
        if unknown := sorted(set(role.rows) - set(self.shared_a)):
            raise UserError(f"role {role.name!r} has rows for {unknown[0]!r}, which is not adapted")
        index = self.role_index(role.name)
        for path, a in self.shared_a.items():
            lo, hi = role.rows.get(path, (0, 0))
            if not 0 <= lo <= hi <= a.shape[0] or (path in role.rows and hi - lo != role.rank_of(path)):
                raise UserError(
                    f"role {role.name!r} has rows [{lo}, {hi}) of A at {path}; "
                    f"{role.rank_of(path)} of its {a.shape[0]} rows are expected"
                )
            b = self.role_b[path][index]
            if b[:, :lo].any() or b[:, hi:].any():
                raise UserError(f"role {role.name!r} has a B at {path} that is not zero outside its rows [{lo}, {hi})")


def _add_json(digest: hashlib._Hash, value: object) -> None:
    digest.update(json.dumps(value, sort_keys=True).encode() + b"\n")


def _add_tensor(digest: hashlib._Hash, tensor: Tensor) -> None:
    _add_json(digest, [str(tensor.dtype), list(tensor.shape)])
    digest.update(tensor_bytes(tensor))


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The tensor's elements in row-major order as raw bytes (little-endian on every machine that torch supports)."""
    return tensor.detach().cpu().contiguous().view(torch.uint8).reshape(-1).numpy().data
