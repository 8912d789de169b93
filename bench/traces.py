"""The trajectories that are measured, and random roles to measure them with where nobody gives a pack."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lragent.adapter_set import AdapterSet, RoleSpec
from lragent.models.targets import target_modules

ROLES = ("plan", "action", "reflect")


@dataclass(frozen=True)
class Planned:
    """One step: the prompt grows by `new` tokens, then `role` generates `answer` tokens."""

    role: str
    new: int
    answer: int


def paper_trace(context: int, roles: Sequence[str] = ROLES) -> list[Planned]:
    """The 17 steps of arXiv 2602.01053. `context`: tokens that each of four tool calls brings; 256 gives 1,936 in all.

    `roles`: who plays plan, action and reflect.
    """
    plan, action, reflect = roles
    steps = [Planned(plan, 512, 32), Planned(plan, 8, 8), Planned(action, 8, 8)]
    for _ in range(4):
        steps += [Planned(plan, context, 32), Planned(plan, 8, 8), Planned(action, 8, 8)]
    return [*steps, Planned(reflect, 32, 32), Planned(reflect, 8, 8)]


def trace_tokens(trace: Sequence[Planned]) -> int:
    """The length of the whole trajectory."""
    return sum(step.new + step.answer for step in trace)


def random_tokens(count: int, vocabulary: int, seed: int) -> list[int]:
    """Token ids that no cache has seen."""
    source = random.Random(seed)
    return [source.randrange(vocabulary) for _ in range(count)]


def random_roles(model: nn.Module, roles: Sequence[str] = ROLES, rank: int = 8, seed: int = 0) -> AdapterSet:
    """Tied roles on q_proj and v_proj with random weights: right for speed, of no use for anything else."""
    source = torch.Generator().manual_seed(seed)
    modules = dict(model.named_modules())
    shared_a, role_b = {}, {}
    for path in target_modules(model, ("q_proj", "v_proj")):
        wide, out = int(modules[path].in_features), int(modules[path].out_features)
        shared_a[path] = torch.randn(rank, wide, generator=source) / wide**0.5
        role_b[path] = torch.randn(len(roles), out, rank, generator=source) / (16 * rank**0.5)
    return AdapterSet(
        base_model="",
        base_fingerprint=None,
        form="tied",
        targets=("q_proj", "v_proj"),
        roles=tuple(RoleSpec(name=name, alpha=2.0 * rank, rank=rank) for name in roles),
        shared_a=shared_a,
        role_b=role_b,
        objective=None,
        prefix_writer=None,
    )
