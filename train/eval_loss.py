"""The loss of each role on trajectories that are not learnt from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate import Accelerator

from lragent.train.role_loss import RoleLoss, loss_inputs
from lragent.train.tasks import Task

EvalLosses = dict[str, dict[str, float]]
"""By how the batches were run (`shared`: one pass for all roles; `per_role`: each role alone), then by role: the mean
loss per authored token, in nats; under `all` the mean over the tokens of all roles."""


@torch.no_grad()
def eval_losses(loss: RoleLoss, tasks: Sequence[Task], roles: Sequence[str], accelerator: Accelerator) -> EvalLosses:
    """Run every task once, without dropout. The tasks are this process's; the means are over all processes."""
    was_training = loss.training
    loss.eval()
    results: EvalLosses = {}
    for name, one_pass in (("shared", True), ("per_role", False)):
        chosen = [task for task in tasks if task.one_pass == one_pass]
        if not chosen:
            continue
        totals = torch.zeros(2, len(roles) + 1, dtype=torch.float64, device=accelerator.device)
        for task in chosen:
            batch = task.batch.to(accelerator.device)
            totals[0] += loss(**loss_inputs(batch, one_pass))
            totals[1] += batch.loss_roles.bincount(minlength=len(roles) + 1)
        totals = accelerator.reduce(totals)
        sums, counts = totals[:, 1:].tolist()
        means = {role: s / n for role, s, n in zip(roles, sums, counts, strict=True) if n}
        results[name] = means | {"all": sum(sums) / sum(counts)}
    loss.train(was_training)
    return results
