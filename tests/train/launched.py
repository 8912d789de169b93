"""What `test_launch.py` launches in several processes: a run, an interrupted one that goes on, and some others.

Arguments: the folder with `tiny/` (a model) and `train.jsonl`, and where to write. Written there: the output folders
`whole/`, `resumed/`, `sequential/`, `short/`, `frozen/`, `left.partial/` (an interrupted run) and, under FSDP2,
`compiled/`. The last line of output is the engine's name.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch.distributed as dist
from accelerate import Accelerator, PartialState

from lragent.errors import UserError
from lragent.train import role_loss, run
from lragent.train.distributed import engine_name
from lragent.train.interrupt import InterruptedRun
from lragent.train.loop import train
from lragent.train.settings import TrainSettings
from lragent.train.zero import ZeroStrategy

STEPS, STOP = 5, 3
SEQUENTIAL = {"objective": "per_role", "tying": "sequential", "max_steps": 2, "recompute": True}
FROZEN = {"objective": "shared", "tying": "frozen", "a_init": "svd", "max_steps": 2}
SHORT = {"objective": "shared", "max_steps": 2, "dtype": "bf16"}
COMPILED = {"objective": "mixed", "max_steps": 2, "compile": True, "recompute": True}
"""Under FSDP2 alone: of what shards the base, it is the one that compiles by default."""


def settings(given: Path, out: Path, **more: object) -> TrainSettings:
    plain: dict[str, object] = {
        "data": given / "train.jsonl", "eval_data": given / "eval.jsonl", "model": str(given / "tiny"),
        "dtype": "float32", "rank": 4, "alpha": 8, "dropout": 0.1, "lr": 1e-2, "max_steps": STEPS, "save_every": 2,
        "tokens_per_batch": 60, "batches_per_step": 4,
    }  # fmt: skip
    return TrainSettings(out=out, **(plain | more))  # type: ignore[arg-type]


def interrupt_after(steps: int) -> None:
    """Send this process what a cluster sends when it takes a machine back, once `steps` steps are done."""
    step = run.PhaseRun._step

    def stepped(self: run.PhaseRun, *args: object) -> dict[str, object]:
        row = step(self, *args)  # type: ignore[arg-type]
        if row["step"] == steps and self.accelerator.is_main_process:
            os.kill(os.getpid(), signal.SIGTERM)
        return row

    run.PhaseRun._step = stepped  # type: ignore[method-assign,assignment]


def watch_dtypes() -> None:
    """Print, once and for the main process, which dtypes the base and the adapters of a run have."""
    prepared = run.PhaseRun.run

    def told(self: run.PhaseRun) -> None:
        parameters = list(self.strategy.built.model.parameters())
        learns = sorted({str(p.dtype) for p in parameters if p.requires_grad})
        frozen = sorted({str(p.dtype) for p in parameters if not p.requires_grad})
        if self.accelerator.is_main_process:
            print("dtypes:", *frozen, *learns, flush=True)
        prepared(self)

    run.PhaseRun.run = told  # type: ignore[method-assign]


def share_out_small_weights() -> None:
    """Let ZeRO-3 shard small weights too, as it does those of a real model; else all of this one's would stay whole."""
    prepare = ZeroStrategy._before_prepare

    def prepared(self: ZeroStrategy, loss: role_loss.RoleLoss) -> None:
        config = self.accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        config["stage3_param_persistence_threshold"] = 0
        prepare(self, loss)

    ZeroStrategy._before_prepare = prepared  # type: ignore[method-assign]


def main() -> None:
    given, out = Path(sys.argv[1]), Path(sys.argv[2])
    share_out_small_weights()
    role_loss.LOGITS_AT_ONCE["cpu"] = 10 * 300  # several pieces, and not as many in every process
    train(settings(given, out / "whole"))
    before = run.PhaseRun._step
    interrupt_after(STOP)
    for name in ("resumed", "left"):
        try:
            train(settings(given, out / name))
            raise AssertionError("nothing interrupted the run")
        except InterruptedRun:
            pass
    run.PhaseRun._step = before  # type: ignore[method-assign]
    train(settings(given, out / "resumed"), resume=True)
    train(settings(given, out / "sequential", **SEQUENTIAL))
    watch_dtypes()
    train(settings(given, out / "short", **SHORT))
    try:
        train(settings(given, out / "frozen", **FROZEN))
    except UserError as error:
        if PartialState().is_main_process:
            print(error, flush=True)
    engine = engine_name(Accelerator())
    if engine == "FSDP2":
        train(settings(given, out / "compiled", **COMPILED))
    if PartialState().is_main_process:
        print(engine, flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
