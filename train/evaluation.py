"""How well the roles do on trajectories that are not learnt from: losses, and turns predicted exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from lragent.train.role_loss import loss_inputs
from lragent.train.tasks import Task

KINDS = {"shared": True, "per_role": False}
"""How batches are run: one pass for all roles, as `base_lr_shared` serves; or each role alone, as `non_shared` does."""


@dataclass(frozen=True)
class EvalScores:
    """By how the batches were run, then by role; `all` stands for all roles together."""

    losses: dict[str, dict[str, float]]
    """Mean loss per authored token, in nats."""
    right: dict[str, dict[str, int]]
    """Turns of which every token was the likeliest, given those before it: what greedy decoding would say."""
    turns: dict[str, dict[str, int]]
    """Turns in all."""

    def accuracy(self, kind: str, role: str = "all") -> float:
        """Share of turns predicted exactly."""
        return self.right[kind][role] / self.turns[kind][role]

    def row(self) -> dict[str, Any]:
        """As it stands in the metrics: `eval` holds losses, `eval_accuracy` shares of turns."""
        return {"eval": self.losses, "eval_accuracy": self.accuracies()}

    def accuracies(self) -> dict[str, dict[str, float]]:
        """Every share of turns predicted exactly."""
        return {kind: {role: self.accuracy(kind, role) for role in by_role} for kind, by_role in self.turns.items()}


@torch.no_grad()
def evaluate(loss: nn.Module, tasks: Sequence[Task], roles: Sequence[str], accelerator: Accelerator) -> EvalScores:
    """Run every one of `tasks` once, without dropout, shared out among the processes. loss: a `RoleLoss`, wrapped.

    Every process must call it with the same tasks, and gets the same scores.
    """
    was_training = loss.training
    loss.eval()
    scores = EvalScores({}, {}, {})
    world, rank = accelerator.num_processes, accelerator.process_index
    for kind, one_pass in KINDS.items():
        chosen = [task for task in tasks if task.one_pass == one_pass]
        if not chosen:
            continue
        sums = torch.zeros(4, len(roles) + 1, dtype=torch.float64, device=accelerator.device)
        for turn in range(-(-len(chosen) // world)):
            # Where they do not come out even a process runs one again and forgets it: a pass concerns all of them.
            at = turn * world + rank
            counted = _counts(loss, chosen[at % len(chosen)], len(roles), accelerator.device)
            if at < len(chosen):
                sums += counted
        lost, tokens, right, turns = accelerator.reduce(sums)[:, 1:].tolist()
        scores.losses[kind] = _by_role(roles, lost, tokens)
        scores.right[kind] = _counted(roles, right, turns)
        scores.turns[kind] = _counted(roles, turns, turns)
    loss.train(was_training)
    return scores


def _counts(loss: nn.Module, task: Task, n_roles: int, device: torch.device) -> torch.Tensor:
    """[4, n_roles + 1]: loss, targets, turns right and turns of each role in one batch."""
    batch = task.batch.to(device)
    lost, right = loss(**loss_inputs(batch, task.one_pass), judge=True)
    authors = batch.loss_roles
    begins = (authors > 0) & (authors != torch.cat([authors.new_zeros(1), authors[:-1]]))
    turn = begins.cumsum(0)[authors > 0] - 1
    of_turn = authors[begins]
    wrong = torch.zeros_like(of_turn).index_add(0, turn, (~right[authors > 0]).to(of_turn.dtype))
    counts = [authors, of_turn[wrong == 0], of_turn]
    return torch.stack([lost.double(), *(c.bincount(minlength=n_roles + 1).double() for c in counts)])


def _by_role(roles: Sequence[str], sums: Sequence[float], counts: Sequence[float]) -> dict[str, float]:
    means = {role: s / n for role, s, n in zip(roles, sums, counts, strict=True) if n}
    return means | {"all": sum(sums) / sum(counts)}


def _counted(roles: Sequence[str], values: Sequence[float], counts: Sequence[float]) -> dict[str, int]:
    own = {role: round(value) for role, value, n in zip(roles, values, counts, strict=True) if n}
    return own | {"all": round(sum(values))}
