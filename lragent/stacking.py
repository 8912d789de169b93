"""Independent adapters as one shared A: exact, at the price of rank (for adapters that were trained apart).

The A's of all roles are laid one under the other, and each role's B keeps its columns in its own block of zeros:
`[A_1; A_2]` with `[B_1 0]` and `[0 B_2]` computes `B_1 A_1` for the first role and `B_2 A_2` for the second.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import reduce

import torch

from lragent.adapter_set import TARGETS, AdapterSet, RoleSpec, natural_key
from lragent.errors import UserError


def stack(adapters: Sequence[AdapterSet]) -> AdapterSet:
    """Stack single-role sets, which may differ in rank, scaling and adapted modules.

    At each module the shared A's rank is the sum of the ranks of the roles that adapt it. Roles of different dtypes
    meet in the smallest dtype that holds them all exactly. Raises `UserError` where the sets were made for different
    bases, or name the same role.
    """
    for each in adapters:
        if len(each.roles) != 1 or each.form != "tied":
            raise ValueError("stack() takes sets of one role each; unstack() gives those")
    known = [s for s in adapters if s.base_fingerprint is not None]
    for each in known[1:]:
        if each.base_fingerprint != known[0].base_fingerprint:
            raise UserError(
                f"roles {known[0].role_names[0]!r} and {each.role_names[0]!r} were made for different bases "
                f"({known[0].base_model!r} and {each.base_model!r}); only adapters of one base can share a cache"
            )
    dtype = reduce(torch.promote_types, (each.dtype for each in adapters))
    paths = sorted({path for each in adapters for path in each.module_paths}, key=natural_key)
    rows: list[dict[str, tuple[int, int]]] = [{} for _ in adapters]
    shared_a, role_b = {}, {}
    for path in paths:
        owners = [i for i, each in enumerate(adapters) if path in each.shared_a]
        blocks = [adapters[i].shared_a[path] for i in owners]
        d_out = {adapters[i].role_b[path].shape[1] for i in owners}
        if len({block.shape[1] for block in blocks}) != 1 or len(d_out) != 1:
            raise UserError(f"the roles disagree about the size of {path}; only adapters of one base can share a cache")
        shared_a[path] = torch.cat([block.to(dtype) for block in blocks])
        role_b[path] = torch.zeros(len(adapters), d_out.pop(), shared_a[path].shape[0], dtype=dtype)
        lo = 0
        for i, block in zip(owners, blocks, strict=True):
            rows[i][path] = (lo, lo + block.shape[0])
            role_b[path][i, :, lo : lo + block.shape[0]] = adapters[i].role_b[path][0]
            lo += block.shape[0]
    found = {target for each in adapters for target in each.targets}
    objectives, writers = {s.objective for s in adapters}, {s.prefix_writer for s in adapters}
    return AdapterSet(
        base_model=(known or adapters)[0].base_model,
        base_fingerprint=known[0].base_fingerprint if known else None,
        form="stacked",
        targets=tuple(target for target in TARGETS if target in found),
        roles=tuple(dataclasses.replace(s.roles[0], rows=r) for s, r in zip(adapters, rows, strict=True)),
        shared_a=shared_a,
        role_b=role_b,
        objective=objectives.pop() if len(objectives) == 1 else None,
        prefix_writer=writers.pop() if len(writers) == 1 else None,
    )


def unstack(adapters: AdapterSet) -> list[AdapterSet]:
    """One set per role, in order, each with its own A and B bit for bit: the inverse of `stack`.

    Also takes a tied set apart; each role then has its own copy of the one A.
    """
    return [single(adapters, name) for name in adapters.role_names]


def single(adapters: AdapterSet, name: str) -> AdapterSet:
    """The role `name` alone, with its own copy of its A and B: it keeps its digest. Raises `UserError` where there is
    none."""
    index = adapters.role_index(name)
    role = adapters.roles[index]
    paths = [path for path in adapters.module_paths if role.adapts(path)]
    found = {path.rpartition(".")[2] for path in paths}
    return dataclasses.replace(
        adapters,
        form="tied",
        targets=tuple(target for target in adapters.targets if target in found),
        roles=(dataclasses.replace(role, rows=None),),
        shared_a={path: adapters.own_a(index, path).clone() for path in paths},
        role_b={path: adapters.own_b(index, path).clone()[None] for path in paths},
    )


def as_tied(adapters: AdapterSet) -> AdapterSet:
    """A stacked set as an ordinary tied one, in which every role may use every row: the start of healing.

    Computes the same: ranks grow to those of the shared A, and alphas with them so that each scaling stays (to one
    rounding). Unstacking is no longer possible. A tied set is given back as it is.
    """
    if adapters.form == "tied":
        return adapters
    ranks = {path: adapters.rank(path) for path in adapters.module_paths}
    roles = [with_ranks(role, ranks, {path: role.scaling(path) for path in ranks}) for role in adapters.roles]
    return dataclasses.replace(adapters, form="tied", roles=tuple(roles))


def with_ranks(role: RoleSpec, ranks: Mapping[str, int], scalings: Mapping[str, float]) -> RoleSpec:
    """The role as one of a tied set with these ranks, by module path; alphas become what gives these scalings."""
    rank = max(ranks.values())
    alphas = {p: scalings[p] * (r**0.5 if role.rslora else r) for p, r in ranks.items()}
    alpha = alphas[next(p for p in ranks if ranks[p] == rank)]
    return dataclasses.replace(
        role,
        rank=rank,
        alpha=alpha,
        rank_pattern={p: r for p, r in ranks.items() if r != rank},
        alpha_pattern={p: a for p, a in alphas.items() if a != alpha},
        rows=None,
    )
