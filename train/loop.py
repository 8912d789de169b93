"""The training loop: batches in, adapters out. The only file that knows wandb."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm import tqdm

from lragent.atomic import new_folder
from lragent.attention import ATTENTION, register_attention
from lragent.chat import Renderer
from lragent.config import dump_config
from lragent.errors import UserError
from lragent.models import load_model, load_tokenizer, resolve_model
from lragent.tied_lora import RoleModel, build_role_model
from lragent.train.data import Example, load_examples
from lragent.train.eval_loss import EvalLosses, eval_losses
from lragent.train.export import PACK, PEFT, RunResult, adapter_set, export
from lragent.train.role_loss import RoleLoss, loss_inputs
from lragent.train.settings import TrainSettings
from lragent.train.tasks import Task, Tasks

DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32}
METRICS = "metrics.jsonl"

Log = Callable[[Mapping[str, Any]], None]


def train(settings: TrainSettings) -> dict[str, Any] | None:
    """Train, and write `settings.out`, which appears whole at the end or not at all.

    Returns the run's summary (`RunResult`, and the paths), in the main process only. Raises UserError for settings,
    data or models that cannot be used, and where a loss or gradient is not finite.
    """
    accelerator = Accelerator()
    folder = new_folder(settings.out) if accelerator.is_main_process else nullcontext(Path())
    with folder as out:
        set_seed(settings.seed)
        source = resolve_model(settings.model)
        renderer = Renderer(load_tokenizer(source))
        examples = _load(settings.data, settings, renderer)
        _check_roles(settings, examples)
        held_out = _load(settings.eval_data, settings, renderer) if settings.eval_data else []

        register_attention()
        base = load_model(source, DTYPES[settings.dtype], accelerator.device, ATTENTION)
        built = build_role_model(
            base,
            settings.roles,
            rank=settings.rank,
            alpha=settings.alpha,
            dropout=settings.dropout,
            targets=settings.targets,
            layers=settings.layers,
            rslora=settings.rslora,
        )
        if settings.objective != "per_role":
            built.split()  # refuses what cannot be trained so, before any work is done
        with _metrics(settings, out, accelerator) as log:
            result = _Run(settings, accelerator, built, examples, held_out, log).run()
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            export(adapter_set(built, settings, source), settings, result, out)
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return None
    pack, peft = settings.out / PACK, settings.out / PEFT
    return asdict(result) | {"out": str(settings.out), "pack": str(pack), "peft": str(peft)}


def _load(path: Path, settings: TrainSettings, renderer: Renderer) -> list[Example]:
    return load_examples(
        path,
        renderer,
        settings.roles,
        objective=settings.objective,
        prefix_writer=settings.prefix_writer,
        max_length=settings.max_length,
    )


def _check_roles(settings: TrainSettings, examples: Sequence[Example]) -> None:
    seen = set(torch.cat([example.loss_roles for example in examples]).unique().tolist())
    for number, role in enumerate(settings.roles, start=1):
        if number not in seen:
            raise UserError(
                f"{settings.data}: the role {role!r} authors nothing; take it out of `roles`, or add its turns."
            )


class _Run:
    """One run over loaded parts. `log` takes every row of metrics."""

    def __init__(
        self,
        settings: TrainSettings,
        accelerator: Accelerator,
        built: RoleModel,
        examples: Sequence[Example],
        held_out: Sequence[Example],
        log: Log,
    ) -> None:
        self.settings, self.accelerator, self.built, self.log = settings, accelerator, built, log
        self.tasks = self._tasks(examples)
        self.held_out = self._tasks(held_out).one_epoch() if held_out else []
        self.steps = settings.max_steps or self.tasks.steps(settings.epochs)
        built.check()
        optimizer = torch.optim.AdamW(built.adapter_parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
        self.loss, self.optimizer = accelerator.prepare(RoleLoss(built), optimizer)

    def _tasks(self, examples: Sequence[Example]) -> Tasks:
        return Tasks(
            self.settings.objective,
            examples,
            tokens_per_batch=self.settings.tokens_per_batch,
            batches_per_step=self.settings.gradient_accumulation * self.accelerator.num_processes,
            seed=self.settings.seed,
        )

    def run(self) -> RunResult:
        """All steps, with the evaluations before, between and after."""
        started = time.monotonic()
        before = self._evaluate(step=0)
        clock = _Clock(self.settings.max_minutes, started) if self.settings.max_minutes else None
        rows: list[dict[str, Any]] = []
        self.loss.train()
        tokens = 0
        with _bar(self.accelerator) as bar:
            while len(rows) < self.steps and (progress := self._progress(len(rows), clock)) < 1:
                step = len(rows) + 1
                world, rank = self.accelerator.num_processes, self.accelerator.process_index
                row = self._step(step, self.tasks.of_step(len(rows), rank=rank, world=world), progress)
                row["seconds"] = round(time.monotonic() - started, 3)
                rows.append(row)
                self.log(row)
                tokens += row["tokens"]
                bar.set_postfix_str(
                    f"step {step}, loss {row['loss']:.3f}, {tokens / row['seconds']:.0f} tokens/s", False
                )
                bar.update(100 * progress - bar.n)
                if self.settings.eval_every and step % self.settings.eval_every == 0 and step < self.steps:
                    self._evaluate(step)
            bar.update(100 - bar.n)
        after = self._evaluate(step=len(rows))
        first, last = _ends(rows)
        return RunResult(
            steps=len(rows),
            tokens=tokens,
            targets=sum(row["targets"] for row in rows),
            seconds=round(time.monotonic() - started, 3),
            train_loss_first=first,
            train_loss_last=last,
            eval_before=before,
            eval_after=after,
        )

    def _progress(self, done: int, clock: _Clock | None) -> float:
        """Share of the run that is behind us, the same on every process: by steps, or by time where that is further.

        Counted in the middle of the coming step, so that neither the first nor the last has a learning rate of zero.
        """
        progress = (done + 0.5) / self.steps
        if clock is not None and done > 0:  # one step is always taken, so that there is something to save
            elapsed = torch.tensor([clock.share()], device=self.accelerator.device)
            progress = max(progress, self.accelerator.gather(elapsed).max().item())
        return progress

    def _step(self, number: int, tasks: Sequence[Task], progress: float) -> dict[str, Any]:
        """One optimizer step over all `tasks`, the mean of the losses over all their targets. Returns its metrics."""
        rate = learning_rate(progress, self.settings.lr, self.settings.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        counts = torch.zeros(2, len(self.built.roles) + 1, dtype=torch.float64, device=self.accelerator.device)
        mine = [sum(task.targets for task in tasks), sum(task.tokens for task in tasks)]
        targets, tokens = self.accelerator.reduce(torch.tensor(mine, device=self.accelerator.device)).tolist()
        for at, task in enumerate(tasks, start=1):
            batch = task.batch.to(self.accelerator.device)
            # Gradients travel between processes once, with the last batch; they are averaged there, hence the factor.
            with nullcontext() if at == len(tasks) else self.accelerator.no_sync(self.loss):
                sums = self.loss(**loss_inputs(batch, task.one_pass))
                self.accelerator.backward(sums.sum() * self.accelerator.num_processes / targets)
            counts[0] += sums.detach()
            counts[1] += batch.loss_roles.bincount(minlength=counts.shape[1])
        counts = self.accelerator.reduce(counts)
        mean = counts[0].sum().item() / targets
        limit = self.settings.clip if self.settings.clip is not None else math.inf
        norm = float(self.accelerator.clip_grad_norm_(self.built.adapter_parameters(), limit))
        if not math.isfinite(mean) or not math.isfinite(norm):
            what = f"the loss is {mean}" if not math.isfinite(mean) else f"the gradient's norm is {norm}"
            rows = ", ".join(source for task in tasks for source in task.batch.sources)
            raise UserError(
                f"step {number}: {what} (learning rate {rate:.3g}, rows {rows}); nothing was saved: lower `lr` or look "
                "at these rows."
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        by_role = {
            f"loss_{role}": loss / n
            for role, loss, n in zip(self.built.roles, *counts[:, 1:].tolist(), strict=True)
            if n
        }
        return {
            "step": number,
            "loss": mean,
            "lr": rate,
            "grad_norm": norm,
            "tokens": tokens,
            "targets": targets,
        } | by_role

    def _evaluate(self, step: int) -> EvalLosses | None:
        if not self.held_out:
            return None
        losses = eval_losses(self.loss, self.held_out, self.built.roles, self.accelerator)
        self.log({"step": step, "eval": losses})
        return losses


class _Clock:
    """How much of the time for steps is used up, of the `minutes` in all, which began at `started`.

    Made when the first evaluation has ended: the last one will take as long, and steps get the time between.
    """

    def __init__(self, minutes: float, started: float) -> None:
        self._begin = time.monotonic()
        evaluation = self._begin - started
        self._seconds = max(1e-9, 60 * minutes - 2 * evaluation)

    def share(self) -> float:
        """0 at the first step, 1 when the time is up."""
        return (time.monotonic() - self._begin) / self._seconds


def learning_rate(progress: float, peak: float, warmup: float) -> float:
    """Linear up to `peak` over the first `warmup` of the run, then along a cosine to zero. progress: 0..1."""
    if progress < warmup:
        return peak * progress / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def _ends(rows: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Mean loss per target over the first and over the last tenth of the steps, at least 1 and at most 10 of them."""
    some = min(10, max(1, len(rows) // 10))

    def mean(part: Sequence[Mapping[str, Any]]) -> float:
        return float(sum(row["loss"] * row["targets"] for row in part) / sum(row["targets"] for row in part))

    return mean(rows[:some]), mean(rows[-some:])


@contextmanager
def _metrics(settings: TrainSettings, out: Path, accelerator: Accelerator) -> Iterator[Log]:
    """What takes every row of metrics: a line in `metrics.jsonl` and, if asked for, wandb. Only in the main process."""
    if not accelerator.is_main_process:
        yield lambda row: None
        return
    tracker = _wandb(settings, out) if settings.tracking == "wandb" else None
    failed = True
    try:
        with (out / METRICS).open("w", encoding="utf-8") as file:

            def log(row: Mapping[str, Any]) -> None:
                file.write(json.dumps(row) + "\n")
                file.flush()
                if tracker is not None:
                    tracker.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])

            yield log
        failed = False
    finally:
        if tracker is not None:
            tracker.finish(exit_code=int(failed))


def _wandb(settings: TrainSettings, out: Path) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise UserError("`tracking: wandb` needs wandb: run `pip install wandb`, or leave `tracking` out.") from error
    # Its files lie in the output folder, which is renamed at the end: a link would lead nowhere then.
    return wandb.init(
        project=settings.project, config=dump_config(settings), dir=str(out), settings=wandb.Settings(symlink=False)
    )


def _bar(accelerator: Accelerator) -> tqdm:
    return tqdm(
        total=100.0,
        desc="training",
        bar_format="{desc} {percentage:3.0f}%|{bar:20}| {elapsed}{postfix}",
        disable=not accelerator.is_main_process,
        mininterval=0.5 if sys.stderr.isatty() else 10.0,
        file=sys.stderr,
    )
