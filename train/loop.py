"""The training loop: batches in, adapters out. The only file that knows wandb."""

from __future__ import annotations

import json
import math
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object, set_seed

from lragent.adapter_set import Objective
from lragent.atomic import new_folder, refuse_existing
from lragent.attention import register_attention
from lragent.chat import Renderer
from lragent.config import dump_config
from lragent.errors import UserError
from lragent.models import ModelSource, load_tokenizer, resolve_model
from lragent.tied_lora import RoleModel, build_role_model
from lragent.train.check import balance
from lragent.train.checkpoints import Checkpoint, Checkpoints, check_plan, read_checkpoint
from lragent.train.compiling import compile_elementwise, wants_compiling
from lragent.train.curves import draw
from lragent.train.data import Example
from lragent.train.distributed import (
    Strategy,
    check_engine,
    engine_name,
    is_zero3,
    load_base,
    make_accelerator,
    make_strategy,
)
from lragent.train.evaluation import EvalScores
from lragent.train.examples import Examples, load_examples
from lragent.train.export import CURVES, PACK, PEFT, RunResult, adapter_set, export
from lragent.train.flops import ModelFlops
from lragent.train.interrupt import Interrupt
from lragent.train.phases import Phase, phases
from lragent.train.role_loss import RoleLoss
from lragent.train.run import Log, Past, PhaseRun, memory_gib
from lragent.train.settings import TrainSettings

DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32}
METRICS = "metrics.jsonl"
PARTIAL = ".partial"
"""At the end of the name of the folder beside `out` that holds a run while it lasts."""

FREE = ("data", "eval_data", "out", "model", "eval_every", "save_every", "keep", "tracking", "project", "max_minutes",
        "compile", "recompute")  # fmt: skip
"""Settings that may differ between a run and the one that goes on from its checkpoint: either they change no step, or
what they name is compared by content."""


class CurvesWarning(UserWarning):
    """There is no picture of the losses."""


def train(settings: TrainSettings, *, resume: bool = False) -> dict[str, Any] | None:
    """Train, and write `settings.out`, which appears whole at the end or not at all.

    resume: go on from the newest whole checkpoint of an interrupted run, if there is one. Returns the run's summary
    (`RunResult`, and the paths), in the main process only. Raises UserError for settings, data or models that cannot be
    used, and where a loss or gradient is not finite; InterruptedRun where a signal ended it.
    """
    accelerator = make_accelerator()
    _check(settings, accelerator)
    if settings.eval_every is not None and settings.eval_data is None:
        raise UserError("`eval_every` is given without `eval_data`; give trajectories to evaluate on.")
    partial = settings.out.with_name(settings.out.name + PARTIAL)
    checkpoints = Checkpoints(partial, keep=settings.keep)
    refuse_existing(settings.out)
    if checkpoints.folders() and not resume:
        raise UserError(
            f"{partial} holds an interrupted run: go on with `--resume auto`, or remove that folder to begin anew."
        )
    set_seed(settings.seed)
    source = resolve_model(settings.model)
    renderer = Renderer(load_tokenizer(source))
    examples = _load(settings.data, settings, renderer)
    _check_roles(settings, examples)
    held_out = _load(settings.eval_data, settings, renderer) if settings.eval_data else None
    plan = _plan(settings, accelerator, source, examples, held_out)
    checkpoint = _newest(checkpoints, accelerator) if resume else None
    if checkpoint is not None:
        check_plan(plan, checkpoint.progress.plan)
    with _place(partial, accelerator), Interrupt().watched() as interrupt:
        if accelerator.is_main_process:
            checkpoints.sweep()
        with _metrics(settings, partial, accelerator, checkpoint) as log:
            run = _Training(settings, accelerator, source, examples, held_out or (), log, checkpoints, plan, interrupt)
            result, built, weights = run.run(checkpoint)
            result = replace(
                result,
                authored=dict(zip(settings.roles, run.authored, strict=True)),
                engine=engine_name(accelerator),
                processes=accelerator.num_processes,
                memory_gib=gather_object([round(memory_gib(accelerator.device), 3)]),
            )
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            with new_folder(settings.out) as out:
                for path in partial.iterdir():
                    if path not in checkpoints.folders():
                        _copy(path, out / path.name)
                _draw(out)
                export(adapter_set(built, settings, source, weights), settings, result, out)
            shutil.rmtree(partial)
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return None
    pack, peft = settings.out / PACK, settings.out / PEFT
    return asdict(result) | {"out": str(settings.out), "pack": str(pack), "peft": str(peft)}


def _newest(checkpoints: Checkpoints, accelerator: Accelerator) -> Checkpoint | None:
    """The newest whole checkpoint as the main process sees it: a file system may show others another one."""
    chosen = checkpoints.newest() if accelerator.is_main_process else None
    done = broadcast_object_list([None if chosen is None else chosen.progress.done])[0]
    if accelerator.is_main_process or done is None:
        return chosen
    return read_checkpoint(checkpoints.folder(done))


def _check(settings: TrainSettings, accelerator: Accelerator) -> None:
    check_engine(accelerator, quantized=settings.quantize is not None, svd=settings.a_init == "svd")
    world = accelerator.num_processes
    if (settings.batches_per_step or world) % world:
        raise UserError(
            f"`batches_per_step` is {settings.batches_per_step}, which {world} processes cannot share out evenly; give "
            f"a multiple of {world}."
        )


def _load(path: Path, settings: TrainSettings, renderer: Renderer) -> Examples:
    return load_examples(
        path,
        renderer,
        settings.roles,
        objective=settings.objective,
        prefix_writer=settings.prefix_writer,
        max_length=settings.max_length,
    )


def _check_roles(settings: TrainSettings, examples: Examples) -> None:
    for role, tokens in zip(settings.roles, examples.authored(len(settings.roles)), strict=True):
        if not tokens:
            raise UserError(
                f"{settings.data}: the role {role!r} authors nothing; take it out of `roles`, or add its turns."
            )


def _plan(
    settings: TrainSettings,
    accelerator: Accelerator,
    source: ModelSource,
    examples: Examples,
    held_out: Examples | None,
) -> dict[str, Any]:
    """What the steps follow from: a run that is resumed must have the same."""
    plan = {name: value for name, value in dump_config(settings).items() if name not in FREE}
    return plan | {
        "batches_per_step": settings.batches_per_step or accelerator.num_processes,
        "model": source.fingerprint(),
        "data": examples.digest,
        "eval_data": held_out.digest if held_out else None,
    }


class _Training:
    """All phases of a run."""

    def __init__(
        self,
        settings: TrainSettings,
        accelerator: Accelerator,
        source: ModelSource,
        examples: Examples,
        held_out: Sequence[Example],
        log: Log,
        checkpoints: Checkpoints,
        plan: Mapping[str, Any],
        interrupt: Interrupt,
    ) -> None:
        self.settings, self.accelerator, self.source = settings, accelerator, source
        self.examples, self.held_out = examples, held_out
        self.authored = examples.authored(len(settings.roles))
        self.log, self.checkpoints, self.plan, self.interrupt = log, checkpoints, plan, interrupt

    def run(self, checkpoint: Checkpoint | None) -> tuple[RunResult, RoleModel, dict[str, torch.Tensor]]:
        """Everything that is left. Returns also the last phase's model, and all adapters, whole."""
        past, begin, weights, eval_after = _past(checkpoint), 0, None, None
        todo = phases(self.settings)
        if checkpoint is not None:
            begin = checkpoint.progress.phase
        for phase in todo[begin:]:
            built, strategy, flops = self._build(phase)
            if phase.number == begin and self.accelerator.is_main_process:
                print(balance(self.settings.roles, self.authored), file=sys.stderr)
            if checkpoint is not None and phase.number == begin:
                strategy.load(checkpoint.state, checkpoint.progress.step)
            elif weights is not None:
                strategy.load(weights, None)
            run = PhaseRun(
                self.settings,
                phase,
                self.accelerator,
                strategy,
                self.examples,
                self.held_out,
                log=self.log,
                past=past,
                checkpoints=self.checkpoints,
                plan=self.plan,
                interrupt=self.interrupt,
                flops=flops,
            )
            run.run()
            if phase is todo[-1]:
                eval_after = run.evaluate_at_end()
            weights = strategy.weights()
            past.step, past.spent = 0, 0.0
            self.accelerator.free_memory()
        assert weights is not None
        return _result(past, eval_after), built, weights

    def _build(self, phase: Phase) -> tuple[RoleModel, Strategy, ModelFlops]:
        settings = self.settings
        register_attention()
        set_seed(settings.seed)
        base = load_base(self.accelerator, self.source, DTYPES[settings.dtype], settings.quantize)
        built = build_role_model(
            base,
            settings.roles,
            rank=settings.rank,
            alpha=settings.alpha,
            dropout=settings.dropout,
            targets=settings.targets,
            layers=settings.layers,
            rslora=settings.rslora,
            a_init=settings.a_init,
        )
        built.learn(a=phase.learns_a, roles=phase.roles)
        if settings.objective != "per_role":
            built.split()  # refuses what cannot be trained so, before any work is done
        return built, *_prepared(settings, self.accelerator, built)


def _prepared(settings: TrainSettings, accelerator: Accelerator, built: RoleModel) -> tuple[Strategy, ModelFlops]:
    """What trains `built` as `settings` say, and what a step of it computes."""
    flops = ModelFlops(built.model.get_base_model())
    loss = RoleLoss(built, recompute=settings.recompute)
    if wants_compiling(settings.compile, accelerator.device, zero3=is_zero3(accelerator)):
        compile_elementwise(built)
    strategy = make_strategy(accelerator, built, loss, lr=settings.lr, decay=settings.weight_decay, clip=settings.clip)
    return strategy, flops


@dataclass(frozen=True)
class Fitted:
    """What `fit` did."""

    result: RunResult
    weights: dict[str, torch.Tensor]
    """All adapters, whole, as `adapter_set` takes them."""
    before: EvalScores | None
    after: EvalScores | None


def fit(
    settings: TrainSettings,
    built: RoleModel,
    examples: Sequence[Example],
    held_out: Sequence[Example] = (),
    *,
    eval_objective: Objective | None = None,
    until: Callable[[EvalScores], bool] | None = None,
) -> Fitted:
    """Train roles that are built already on examples that are loaded already, in one phase; nothing is written.

    What `settings` says of data, model, output and checkpoints is not looked at. until is asked after the evaluations
    of `eval_every`; see PhaseRun. Raises UserError where a loss or gradient is not finite.
    """
    accelerator = make_accelerator()
    _check(settings, accelerator)
    strategy, flops = _prepared(settings, accelerator, built)
    phase, past = Phase(0, True, settings.roles, 1.0), Past()
    run = PhaseRun(
        settings, phase, accelerator, strategy, examples, held_out, log=lambda row: None, past=past, flops=flops,
        until=until, eval_objective=eval_objective,
    )  # fmt: skip
    run.run()
    after = run.evaluate_at_end()
    weights = strategy.weights()
    accelerator.free_memory()
    return Fitted(_result(past, after), weights, past.eval_before, after)


def _past(checkpoint: Checkpoint | None) -> Past:
    if checkpoint is None:
        return Past()
    progress = checkpoint.progress
    before = None if progress.eval_before is None else EvalScores(**progress.eval_before)
    return Past(progress.step, progress.done, *progress.spent, before, [dict(row) for row in checkpoint.rows])


def _result(past: Past, eval_after: EvalScores | None) -> RunResult:
    steps = [row for row in past.rows if "loss" in row]
    first, last = _ends(steps)
    return RunResult(
        steps=len(steps),
        tokens=sum(row["tokens"] for row in steps),
        targets=sum(row["targets"] for row in steps),
        seconds=round(past.seconds, 3),
        train_loss_first=first,
        train_loss_last=last,
        eval_before=None if past.eval_before is None else past.eval_before.losses,
        eval_after=None if eval_after is None else eval_after.losses,
        accuracy_before=None if past.eval_before is None else past.eval_before.accuracies(),
        accuracy_after=None if eval_after is None else eval_after.accuracies(),
    )


def _ends(rows: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Mean loss per target over the first and over the last tenth of the steps, at least 1 and at most 10 of them.

    NaN where no step was taken.
    """
    if not rows:
        return math.nan, math.nan
    some = min(10, max(1, len(rows) // 10))

    def mean(part: Sequence[Mapping[str, Any]]) -> float:
        return float(sum(row["loss"] * row["targets"] for row in part) / sum(row["targets"] for row in part))

    return mean(rows[:some]), mean(rows[-some:])


@contextmanager
def _place(partial: Path, accelerator: Accelerator) -> Iterator[None]:
    """The folder of an unfinished run. Where it fails without a checkpoint, nothing is left of it."""
    if accelerator.is_main_process:
        try:
            partial.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the folder {partial}: {error.strerror}") from error
    accelerator.wait_for_everyone()
    try:
        yield
    finally:
        if accelerator.is_main_process and partial.is_dir() and not Checkpoints(partial, keep=1).folders():
            shutil.rmtree(partial, ignore_errors=True)


def _draw(out: Path) -> None:
    """The picture of the losses; a run is not lost for want of it."""
    rows = [json.loads(line) for line in (out / METRICS).read_text(encoding="utf-8").splitlines()]
    try:
        draw(rows, out / CURVES)
    except ImportError:
        warnings.warn(f"no {CURVES}: matplotlib is not installed", CurvesWarning, stacklevel=2)


def _copy(path: Path, to: Path) -> None:
    if path.is_dir():
        shutil.copytree(path, to, symlinks=False)
    else:
        shutil.copy2(path, to)


@contextmanager
def _metrics(
    settings: TrainSettings, partial: Path, accelerator: Accelerator, checkpoint: Checkpoint | None
) -> Iterator[Log]:
    """What takes every row of metrics: a line in `metrics.jsonl` and, if asked for, wandb. Only in the main process."""
    if not accelerator.is_main_process:
        yield lambda row: None
        return
    tracker = _wandb(settings, partial) if settings.tracking == "wandb" else None
    failed = True
    try:
        with (partial / METRICS).open("w", encoding="utf-8") as file:

            def log(row: Mapping[str, Any]) -> None:
                file.write(json.dumps(row) + "\n")
                file.flush()
                if tracker is not None:
                    tracker.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])

            for row in checkpoint.rows if checkpoint is not None else ():
                log(row)
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
