"""One phase of training: steps, evaluations between them, and checkpoints."""

from __future__ import annotations

import math
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from tqdm import tqdm

from lragent.adapter_set import Objective
from lragent.errors import UserError
from lragent.train.checkpoints import Checkpoint, Checkpoints, CheckpointWarning, Progress
from lragent.train.data import Example
from lragent.train.distributed import Strategy
from lragent.train.evaluation import EvalScores, evaluate
from lragent.train.flops import ModelFlops, peak_flops
from lragent.train.interrupt import Interrupt, InterruptedRun
from lragent.train.phases import Phase
from lragent.train.role_loss import loss_inputs
from lragent.train.schedule import Clock, learning_rate
from lragent.train.settings import TrainSettings
from lragent.train.tasks import Task, Tasks

SECONDS_BETWEEN_SAVES = 600.0

Log = Callable[[Mapping[str, Any]], None]


@dataclass
class Past:
    """What lies behind a phase that begins: earlier phases, and its own part before an interruption."""

    step: int = 0
    """Of this phase."""
    done: int = 0
    """Of all phases."""
    spent: float = 0.0
    """Seconds for steps in this phase."""
    seconds: float = 0.0
    """For everything in all phases."""
    eval_before: EvalScores | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)


class PhaseRun:
    """The steps of one phase over loaded parts; every process of the run has one."""

    def __init__(
        self,
        settings: TrainSettings,
        phase: Phase,
        accelerator: Accelerator,
        strategy: Strategy,
        examples: Sequence[Example],
        held_out: Sequence[Example],
        *,
        log: Log,
        past: Past,
        checkpoints: Checkpoints | None = None,
        plan: Mapping[str, Any] | None = None,
        interrupt: Interrupt | None = None,
        until: Callable[[EvalScores], bool] | None = None,
        flops: ModelFlops | None = None,
        eval_objective: Objective | None = None,
    ) -> None:
        """log takes every row of metrics. until is asked after every evaluation but the last whether that is enough.

        eval_objective: as what held-out trajectories are run, None = as those that are learnt from.
        """
        self.settings, self.phase, self.accelerator, self.strategy = settings, phase, accelerator, strategy
        self.log, self.past, self.checkpoints, self.plan = log, past, checkpoints, plan or {}
        self.interrupt, self.until = interrupt or Interrupt(), until
        self.flops, self.peak = flops, peak_flops(accelerator.device)
        self.tasks = self._tasks(settings.objective, examples, phase.roles)
        kind = eval_objective or settings.objective
        self.held_out = self._tasks(kind, held_out, settings.roles).one_epoch() if held_out else []
        self.steps = settings.max_steps or self.tasks.steps(settings.epochs)
        self._began = time.monotonic() - past.seconds
        self._saved = past.step, time.monotonic()

    def _tasks(self, objective: Objective, examples: Sequence[Example], roles: Sequence[str]) -> Tasks:
        settings, world = self.settings, self.accelerator.num_processes
        return Tasks(
            objective,
            examples,
            tokens_per_batch=settings.tokens_per_batch,
            batches_per_step=settings.batches_per_step or world,
            seed=settings.seed,
            roles=frozenset(settings.roles.index(role) + 1 for role in roles),
        )

    def run(self) -> None:
        """All steps that are left, with the evaluations before, between and after.

        What was measured is in `past` then. Raises UserError where a loss or gradient is not finite, and
        InterruptedRun, with a checkpoint written, where a signal asks for an end.
        """
        enough = False
        evaluated = 0.0
        if self.past.eval_before is None and self.held_out:
            began = time.monotonic()
            self.past.eval_before = self._evaluate()
            enough = self.until is not None and self.until(self.past.eval_before)
            evaluated = time.monotonic() - began
        minutes = self.settings.max_minutes
        # The last evaluation will take as long as the first; steps get the time that is left beside both.
        limit = None if minutes is None else 60 * minutes * self.phase.share - 2 * evaluated
        clock = Clock(limit, self.past.spent)
        self.strategy.loss.train()
        with self._bar() as bar:
            while self.past.step < self.steps and not enough:
                tasks = self._share_of(self.past.step)
                agreed = self._agree(tasks, clock)
                if agreed.save or agreed.stop:
                    self._save()
                if agreed.stop:
                    self._stop()
                # In the middle of the coming step, so that neither the first nor the last has a rate of zero.
                progress = max((self.past.step + 0.5) / self.steps, agreed.time)
                if progress >= 1 and self.past.step > 0:  # one step is always taken, so that there is something to save
                    break
                row = self._step(tasks, agreed, progress)
                self.past.spent = clock.spent()
                self._tell(bar, row, progress)
                if self.settings.eval_every and self.past.step % self.settings.eval_every == 0:
                    scores = self._evaluate() if self.past.step < self.steps else None
                    enough = scores is not None and self.until is not None and self.until(scores)
            bar.update(100 - bar.n)
        self.past.seconds = time.monotonic() - self._began
        self._save()

    def evaluate_at_end(self) -> EvalScores | None:
        """The evaluation after the last step."""
        scores = self._evaluate() if self.held_out else None
        self.past.seconds = time.monotonic() - self._began
        return scores

    # -- a step --------------------------------------------------------------------------------------------------

    def _share_of(self, step: int) -> list[Task]:
        return self.tasks.of_step(step, rank=self.accelerator.process_index, world=self.accelerator.num_processes)

    def _agree(self, tasks: Sequence[Task], clock: Clock) -> Agreed:
        """What all processes must know alike before a step. The clock is the main process's."""
        main = self.accelerator.is_main_process
        due = main and self._save_due()
        flops = sum(self.flops.of(task.batch.spans, task.targets) for task in tasks) if self.flops else 0.0
        values = [
            sum(task.targets for task in tasks),
            sum(task.tokens for task in tasks),
            flops,
            clock.share() if main else 0.0,
            float(due),
            float(self.interrupt.number != 0),
        ]
        targets, tokens, flops, share, save, stop = self._sum(values)
        return Agreed(round(targets), round(tokens), flops, share, save > 0, stop > 0)

    def _sum(self, values: list[float]) -> list[float]:
        if self.accelerator.num_processes == 1:
            return values
        summed: list[float] = self.accelerator.reduce(
            torch.tensor(values, dtype=torch.float64, device=self.accelerator.device)
        ).tolist()
        return summed

    def _step(self, tasks: Sequence[Task], agreed: Agreed, progress: float) -> dict[str, Any]:
        """One optimizer step over all `tasks`, the mean of the losses over all their targets. Returns its metrics."""
        began = time.monotonic()
        rate = learning_rate(progress, self.settings.lr, self.settings.warmup)
        self.strategy.set_rate(rate)
        counts = torch.zeros(2, len(self.settings.roles) + 1, dtype=torch.float64, device=self.accelerator.device)
        for at, task in enumerate(tasks, start=1):
            batch = task.batch.to(self.accelerator.device)
            # Dropout follows from the task, so neither an interruption nor the number of processes changes it.
            torch.manual_seed((self.settings.seed * 1_000_003 + task.number + 1) % 2**63)
            last = at == len(tasks)
            with nullcontext() if last else self.accelerator.no_sync(self.strategy.loss):
                sums = self.strategy.loss(**loss_inputs(batch, task.one_pass))
                self.strategy.backward(sums.sum() / agreed.targets, last=last)
            counts[0] += sums.detach()
            counts[1] += batch.loss_roles.bincount(minlength=counts.shape[1])
        lost, learnt = self.accelerator.reduce(counts).tolist()
        mean = sum(lost) / agreed.targets
        if not math.isfinite(mean):
            raise self._broken(f"the loss is {mean}", rate, tasks)
        norm = self.strategy.step()
        if not math.isfinite(norm):
            raise self._broken(f"the gradient's norm is {norm}", rate, tasks)
        self.past.step += 1
        self.past.done += 1
        seconds = time.monotonic() - began
        by_role = {
            f"loss_{role}": loss / n
            for role, loss, n in zip(self.settings.roles, lost[1:], learnt[1:], strict=True)
            if n
        }
        speed = {"tokens_per_second": agreed.tokens / seconds, "memory_gib": memory_gib(self.accelerator.device)}
        if self.flops and self.peak:
            speed["mfu"] = agreed.flops / seconds / (self.peak * self.accelerator.num_processes)
        return {
            "step": self.past.done,
            "loss": mean,
            "lr": rate,
            "grad_norm": norm,
            "tokens": agreed.tokens,
            "targets": agreed.targets,
            "seconds": round(time.monotonic() - self._began, 3),
            **by_role,
            **{name: round(value, 4) for name, value in speed.items()},
        }

    def _broken(self, what: str, rate: float, tasks: Sequence[Task]) -> UserError:
        rows = ", ".join(source for task in tasks for source in task.batch.sources)
        kept = self.checkpoints.folders() if self.checkpoints else []
        last = (
            f"the last good checkpoint is {kept[0]} (`--resume auto` goes on from it with the same settings)"
            if kept
            else "nothing was saved"
        )
        return UserError(
            f"step {self.past.done + 1}: {what} (learning rate {rate:.3g}, rows {rows}); {last}: lower `lr` or look at "
            "these rows."
        )

    # -- between steps -------------------------------------------------------------------------------------------

    def _evaluate(self) -> EvalScores:
        scores = evaluate(self.strategy.loss, self.held_out, self.settings.roles, self.accelerator)
        self._log({"step": self.past.done, **scores.row()})
        return scores

    def _log(self, row: dict[str, Any]) -> None:
        self.past.rows.append(row)
        self.log(row)

    def _save_due(self) -> bool:
        if self.checkpoints is None or self.past.step == self._saved[0]:
            return False
        if self.settings.save_every is not None:
            return self.past.step % self.settings.save_every == 0
        return time.monotonic() - self._saved[1] >= SECONDS_BETWEEN_SAVES

    def _save(self) -> None:
        """Write a checkpoint. Where the disk is full training goes on: what was written before stays whole."""
        if self.checkpoints is None or self.past.step == self._saved[0]:
            return
        state = self.strategy.state()
        if self.accelerator.is_main_process:
            before = self.past.eval_before
            progress = Progress(
                phase=self.phase.number,
                step=self.past.step,
                done=self.past.done,
                spent=(self.past.spent, time.monotonic() - self._began),
                eval_before=None if before is None else vars(before),
                plan=self.plan,
            )
            try:
                self.checkpoints.write(Checkpoint(progress, state, self.past.rows))
            except UserError as error:
                warnings.warn(f"no checkpoint of step {self.past.done}: {error}", CheckpointWarning, stacklevel=2)
        self.accelerator.wait_for_everyone()  # one that ended now could take the one that writes with it
        self._saved = self.past.step, time.monotonic()

    def _stop(self) -> None:
        kept = self.checkpoints.folders() if self.checkpoints else []
        where = f"{kept[0]} holds it: go on with --resume auto" if kept else "nothing was saved"
        raise InterruptedRun(f"stopped after step {self.past.done}, as asked; {where}.", self.interrupt.number or 15)

    # -- what is seen --------------------------------------------------------------------------------------------

    def _bar(self) -> tqdm:
        bar = tqdm(
            total=100.0,
            desc="training"
            if len(self.phase.roles) == len(self.settings.roles)
            else "training " + ", ".join(self.phase.roles),
            bar_format="{desc} {percentage:3.0f}%|{bar:20}| {elapsed}{postfix}",
            disable=not self.accelerator.is_main_process,
            mininterval=0.5 if sys.stderr.isatty() else 10.0,
            file=sys.stderr,
        )
        return bar

    def _tell(self, bar: tqdm, row: dict[str, Any], progress: float) -> None:
        self._log(row)
        roles = ", ".join(f"{role} {row[f'loss_{role}']:.2f}" for role in self.phase.roles if f"loss_{role}" in row)
        mfu = f", MFU {row['mfu']:.0%}" if "mfu" in row else ""
        bar.set_postfix_str(
            f"step {row['step']}, loss {row['loss']:.3f} ({roles}), gradient {row['grad_norm']:.2g}, "
            f"{row['tokens_per_second']:.0f} tokens/s{mfu}, {row['memory_gib']:.1f} GiB",
            refresh=False,
        )
        bar.update(100 * progress - bar.n)


@dataclass(frozen=True)
class Agreed:
    """What all processes know alike of the coming step."""

    targets: int
    tokens: int
    flops: float
    time: float
    """Share of the time that is used up."""
    save: bool
    stop: bool


def memory_gib(device: torch.device) -> float:
    """GiB of this process: the most that was allocated on its GPU, or without one what it holds now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return float(psutil.Process().memory_info().rss) / 2**30
