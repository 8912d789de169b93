"""The trajectories that are measured, and random roles to measure them with where nobody gives a pack."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from lragent.adapter_set import AdapterSet, RoleSpec
from lragent.errors import UserError
from lragent.models.targets import target_modules
from lragent.modes import SharingMode

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


def sized_trace(tokens: int) -> list[Planned]:
    """`paper_trace` of about `tokens` tokens in all, and at least 916."""
    return paper_trace(max(1, (tokens - trace_tokens(paper_trace(0))) // 4))


def team(count: int) -> tuple[str, ...]:
    """Names for `count` roles: plan, action, reflect, role4, role5 …"""
    if count < 1:
        raise UserError(f"--roles: must be at least 1, not {count}.")
    return (*ROLES, *(f"role{number}" for number in range(4, count + 1)))[:count]


def team_trace(context: int, roles: Sequence[str]) -> list[Planned]:
    """The paper's steps for any number of roles. With three they play plan, action and reflect.

    With another number they take the steps in turn: what a step brings and asks for is as in the paper, and every step
    changes the role.
    """
    if len(roles) == 3:
        return paper_trace(context, roles)
    return [replace(step, role=roles[at % len(roles)]) for at, step in enumerate(paper_trace(context))]


@dataclass(frozen=True)
class Work:
    """What a step must compute in one sharing mode.

    prompt: tokens of the whole prompt. full: those that no cache holds for this role. lr_only: those before them whose
    base cache exists, so that only the role's LR cache is written (`base_shared`). answer: tokens to generate.
    """

    role: str
    prompt: int
    full: int
    lr_only: int
    answer: int

    @property
    def start(self) -> int:
        """How many positions nothing is computed for."""
        return self.prompt - self.full - self.lr_only


def trace_work(trace: Sequence[Planned], mode: SharingMode) -> list[Work]:
    """What each step computes, if nothing is ever evicted. An answer's last token is computed by the next step."""
    everyone, own = 0, dict.fromkeys((step.role for step in trace), 0)
    length = 0
    works = []
    for step in trace:
        prompt = length + step.new
        start = everyone if mode.one_writer_per_token else own[step.role]
        lr_only = max(0, everyone - start) if mode is SharingMode.BASE_SHARED else 0
        works.append(Work(step.role, prompt, prompt - start - lr_only, lr_only, step.answer))
        length = prompt + step.answer
        everyone = own[step.role] = length - 1
    return works


def trace_slots(trace: Sequence[Planned], mode: SharingMode) -> int:
    """Slots that the trajectory fills where nothing is evicted, of the pool of which it fills the most."""
    last = {work.role: work.prompt + work.answer for work in trace_work(trace, mode)}
    return max(last.values()) if mode.one_writer_per_token else sum(last.values())


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
