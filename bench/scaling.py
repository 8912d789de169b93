"""`python -m lragent.bench scaling`: the same training on one GPU and on several, under each of the strategies.

Every run is what a user would start: accelerate's launcher with a config of configs/accelerate/, on random weights of a
known shape and made-up conversations. Whatever the strategy, steps learn from the same batches, so each run's losses
are compared with those on one GPU, and no speed is shown as good beside a loss that is not the same.

tokens/s, MFU: over the steps after --warmup, with all that lies between them. efficiency: tokens/s by those of as many
single GPUs. GiB: allocated at the peak, on the GPU that needs most. around: starting, loading, sharding, saving. off:
relative differences from one GPU's run: in the loss of the step that is farthest, in the norm of the first gradient, in
what all B have become.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from lragent.bench import machine
from lragent.bench.launches import Launched, accelerate_config, launch
from lragent.bench.scaling_problem import write_conversations, write_model
from lragent.bench.shapes import SHAPES
from lragent.errors import LRAgentError, UserError
from lragent.models import fingerprint
from lragent.pack import read_pack
from lragent.train.export import PACK

STRATEGIES = ("one", "ddp", "zero2", "zero3", "fsdp2")
OBJECTIVES = ("shared", "per_role", "mixed")
SAME = {"float32": 2e-4, "bf16": 5e-3}
"""How far losses may be apart, relatively, by the dtype of the base: sums are taken in another order."""

MEMORY = Path("/dev/shm")
ROOM = 24 << 30
"""Bytes that a model of eight billion weights and the runs need."""


class Bench:
    """Runs of one model and one file of conversations."""

    def __init__(self, args: argparse.Namespace, work: Path) -> None:
        self._args, self._work = args, work
        self._dtype = "bf16" if torch.cuda.is_available() else "float32"
        self._model, self._data = work / "models" / f"{args.shape}-{self._dtype}", work / "conversations.jsonl"
        self._runs = Path(tempfile.mkdtemp(prefix="runs-", dir=work))
        self._ones: dict[str, Launched] = {}
        self._digest = threading.Thread(target=lambda: fingerprint(self._model))

    def prepare(self, device: torch.device) -> None:
        """Write model and conversations. A model that lies in the folder already is taken."""
        args = self._args
        if not self._model.is_dir():
            write_model(args.shape, self._model, device, torch.bfloat16 if self._dtype == "bf16" else torch.float32)
        write_conversations(self._data, args.conversations, args.tokens, SHAPES[args.shape].vocabulary)

    def run(self, strategy: str, objective: str) -> dict[str, Any]:
        """Train once; gives its figures."""
        out = self._out(strategy, objective)
        done = self._launch(strategy, objective, out)
        if strategy == "one":
            self._ones[objective] = done
        figures = measured(done, self._args.warmup)
        one = self._ones.get(objective)
        if one is not None and strategy != "one":
            figures |= compared(done.rows, one.rows, SAME[self._dtype])
            rate = measured(one, self._args.warmup)["tokens_s"]
            figures["efficiency"] = figures["tokens_s"] / (self._args.gpus * rate)
            figures["b_off"] = self._b_off(out, objective)
        return {"strategy": strategy, "objective": objective, **figures}

    def resume(self, before: str, after: str, objective: str) -> dict[str, Any]:
        """Stop a run of one strategy halfway, and go on under another; gives what became of it."""
        out = self._runs / f"{before}-then-{after}"
        begun = self._launch(before, objective, out, stop_after=self._args.steps // 2)
        ended = self._launch(after, objective, out, resume=True)
        row = {"from": before, "to": after, "objective": objective, "stopped_after": len(begun.rows)}
        row |= {"wall_s": [round(part.wall_s, 1) for part in (begun, ended)], "processes": ended.summary["processes"]}
        row |= compared(ended.rows, self._ones[objective].rows, SAME[self._dtype])
        return row | {"b_off": self._b_off(out, objective)}

    def _b_off(self, out: Path, objective: str) -> float:
        return b_difference(out / PACK, self._out("one", objective) / PACK)

    def _out(self, strategy: str, objective: str) -> Path:
        return self._runs / f"{objective}-{strategy}"

    def _launch(self, strategy: str, objective: str, out: Path, **options: Any) -> Launched:
        args = self._args
        words = [
            f"data={self._data}", f"model={self._model}", f"dtype={self._dtype}", f"objective={objective}",
            f"max_steps={args.steps}", f"tokens_per_batch={args.tokens_per_batch}",
            f"batches_per_step={args.gpus * args.batches}", *args.settings,
        ]  # fmt: skip
        if self._digest.ident is None:
            self._digest.start()  # beside the first run, which would begin with it only after a while
        config = accelerate_config(strategy, args.gpus, self._runs)
        done = launch(config, out, words, limit_s=args.run_limit, **options)
        self._digest.join()
        return done


def measured(done: Launched, warmup: int) -> dict[str, Any]:
    """The figures of one run: rates over the steps after the first `warmup`, memory [GiB] of each process."""
    rows = done.rows[warmup:]
    ends = [row["seconds"] for row in done.rows[warmup - 1 :]]
    seconds = ends[-1] - ends[0]
    worked = [row["tokens"] / row["tokens_per_second"] for row in rows]
    mfu = sum(row["mfu"] * s for row, s in zip(rows, worked, strict=True)) / seconds if "mfu" in rows[0] else None
    return {
        "engine": done.summary["engine"],
        "tokens": sum(row["tokens"] for row in rows),
        "tokens_s": sum(row["tokens"] for row in rows) / seconds,
        "step_s": statistics.median(after - before for before, after in pairwise(ends)),
        "mfu": mfu,
        "memory_gib": done.summary["memory_gib"],
        "first_step_s": done.rows[0]["seconds"],
        "around_s": round(done.wall_s - done.summary["seconds"], 1),
        "wall_s": round(done.wall_s, 1),
        "losses": [row["loss"] for row in done.rows],
        "gradient_norms": [row["grad_norm"] for row in done.rows],
    }


def compared(rows: Sequence[Mapping[str, Any]], one: Sequence[Mapping[str, Any]], same: float) -> dict[str, Any]:
    """How far a run's steps are from those of one GPU. Raises LRAgentError where they learnt from other tokens.

    The first gradient decides too: the losses of a few steps hardly say whether one was scaled. Later ones, and the
    weights, do not, since in AdamW's first steps a gradient near zero goes by its sign, which rounding decides.
    """
    if [(row["step"], row["targets"]) for row in rows] != [(row["step"], row["targets"]) for row in one]:
        raise LRAgentError("its steps learnt from other tokens than one GPU's.")

    def off(name: str) -> list[float]:
        return [abs(row[name] / other[name] - 1) for row, other in zip(rows, one, strict=True)]

    losses, norms = off("loss"), off("grad_norm")
    apart = [abs(row["loss"] - other["loss"]) for row, other in zip(rows, one, strict=True)]
    return {
        "loss_off": max(losses), "loss_off_abs": max(apart), "first_norm_off": norms[0], "norm_off": max(norms),
        "tolerance": same, "same": max(*losses, norms[0]) <= same,
    }  # fmt: skip


def b_difference(pack: Path, one: Path) -> float:
    """The distance of two packs' B from each other, by the length of the second's."""
    mine, other = (torch.cat([b.flatten() for b in read_pack(path).role_b.values()]).double() for path in (pack, one))
    return float((mine - other).norm() / other.norm())


def libraries() -> dict[str, str | None]:
    """What shares the work out, by version; None where it is not installed."""
    found: dict[str, str | None] = {}
    for name in ("accelerate", "deepspeed"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


@contextmanager
def workplace(given: Path | None) -> Iterator[Path]:
    """The folder for model and runs: the one given, which is kept; else one in memory, or on disk for want of room."""
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given
        return
    roomy = MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > ROOM
    with tempfile.TemporaryDirectory(prefix="lragent-scaling-", dir=MEMORY if roomy else None) as place:
        yield Path(place)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; raises UserError naming an option that cannot be."""
    parser = argparse.ArgumentParser(
        prog="python -m lragent.bench scaling", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    flag = parser.add_argument
    flag("settings", nargs="*", metavar="key=value", help="settings of training, such as recompute=true")
    flag("--shape", default="llama-3.1-8b", choices=SHAPES, help="the model's shape (llama-3.1-8b)")
    flag("--gpus", type=int, default=2, choices=(2, 8), help="how many there are to be (2)")
    flag("--strategies", default="one,ddp,zero2,zero3", help="of one, ddp, zero2, zero3, fsdp2 (all but the last)")
    flag("--objectives", default="shared,per_role", help="of shared, per_role, mixed (the first two)")
    flag("--resume", default="", metavar="FROM:TO,…", help="runs stopped under one strategy that go on under another")
    flag("--steps", type=int, default=10, metavar="N", help="of each run (10)")
    flag("--warmup", type=int, default=3, metavar="N", help="steps that are not timed (3)")
    flag("--tokens", type=int, default=4096, metavar="N", help="of a conversation (4096)")
    flag("--conversations", type=int, default=16, metavar="N", help="to learn from, again and again (16)")
    flag("--tokens-per-batch", type=int, default=8192, metavar="N", help="at most (8192)")
    flag("--batches", type=int, default=1, metavar="N", help="of a step, for each GPU there is to be (1)")
    flag("--time-limit", type=float, default=1200.0, metavar="S", help="seconds after which no run begins (1200)")
    flag("--run-limit", type=float, default=300.0, metavar="S", help="seconds after which a run is ended (300)")
    flag("--work", type=Path, metavar="FOLDER", help="for model and runs, and kept (one in memory, removed)")
    flag("--results", type=Path, default=machine.RESULTS, metavar="FOLDER", help="where to save (bench/results/)")
    flag("--name", default="scaling", help="of the file of results (scaling)")
    flag("--no-save", action="store_true", help="write no results")
    args = parser.parse_args(argv)
    args.strategies, args.objectives = _words(args, "strategies", STRATEGIES), _words(args, "objectives", OBJECTIVES)
    args.resume = [tuple(pair.split(":")) for pair in args.resume.split(",") if pair]
    for pair in args.resume:
        if len(pair) != 2 or not set(pair) <= set(STRATEGIES):
            raise UserError(f"--resume: {':'.join(pair)!r} is not two of {', '.join(STRATEGIES)} with a colon between.")
    if args.resume and "one" not in args.strategies:
        raise UserError("--resume: is compared with one GPU's run; put `one` among --strategies.")
    if min(args.tokens, args.conversations, args.tokens_per_batch, args.batches, args.warmup) < 1:
        raise UserError("--tokens, --conversations, --tokens-per-batch, --batches, --warmup: must be at least 1.")
    if args.steps <= args.warmup:
        raise UserError(f"--steps: must be more than --warmup, which is {args.warmup}.")
    if torch.cuda.is_available() and torch.cuda.device_count() < args.gpus:
        raise UserError(f"--gpus: {args.gpus} are asked for, and {torch.cuda.device_count()} can be seen.")
    return args


def _words(args: argparse.Namespace, name: str, known: Sequence[str]) -> list[str]:
    words: list[str] = getattr(args, name).split(",")
    for word in words:
        if word not in known:
            raise UserError(f"--{name}: {word!r} is none of {', '.join(known)}.")
    return sorted(set(words), key=known.index)  # one GPU first: others are compared with it


def main(argv: Sequence[str]) -> int:
    """Measure; save after every run; print the table, and the numbers as the last line.

    Returns 1 where a run failed or was not the same as one GPU's.
    """
    args = parse(argv)
    began = time.monotonic()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    console = Console(width=None if Console().is_terminal else 160)
    numbers: dict[str, Any] = {
        "benchmark": "scaling", **machine.facts(device), **libraries(), "gpus": args.gpus, "shape": args.shape,
        "conversation": args.tokens, "conversations": args.conversations, "tokens_per_batch": args.tokens_per_batch,
        "batches_per_step": args.gpus * args.batches, "steps": args.steps, "warmup": args.warmup,
        "settings": args.settings, "rows": [], "resumed": [], "left_out": [],
    }  # fmt: skip
    with workplace(args.work) as work:
        bench = Bench(args, work)
        bench.prepare(device)
        numbers["prepared_s"] = round(time.monotonic() - began, 1)
        todo: list[tuple[str, ...]] = [(way, objective) for objective in args.objectives for way in args.strategies]
        todo += [(*pair, args.objectives[0]) for pair in args.resume]
        for at, words in enumerate(todo):
            if time.monotonic() - began > args.time_limit:
                numbers["left_out"] = [" ".join(rest) for rest in todo[at:]]
                break
            resumed = len(words) == 3
            try:
                row = bench.resume(*words) if resumed else bench.run(*words)
            except LRAgentError as error:
                row = {
                    **dict(zip(("from", "to") if resumed else ("strategy",), words, strict=False)),
                    "failed": str(error),
                }
                row["objective"] = words[-1]
            numbers["resumed" if resumed else "rows"].append(row)
            console.print(_line(words, row), highlight=False, markup=False)
            if not args.no_save:
                machine.save(args.name, numbers, args.results)
    show(numbers, console)
    print(json.dumps(numbers))
    return int(any("failed" in row or not row.get("same", True) for row in numbers["rows"] + numbers["resumed"]))


def _line(words: Sequence[str], row: Mapping[str, Any]) -> str:
    if "failed" in row:
        return f"{' '.join(words)}: {row['failed']}"
    return f"{' '.join(words)}: {row['wall_s']} s" + (f", {row['tokens_s']:,.0f} tokens/s" if "tokens_s" in row else "")


def show(numbers: Mapping[str, Any], console: Console) -> None:
    """The rows as a table, and what became of the runs that were resumed."""
    table = Table(title=f"{numbers['shape']}, {numbers['gpus']} x {numbers['machine']}")
    for name in ("objective", "strategy", "tokens/s", "efficiency", "MFU", "s a step", "GiB", "around", "off", "same"):
        table.add_column(name, justify="left" if name in ("objective", "strategy") else "right")
    for row in numbers["rows"]:
        if "failed" in row:
            table.add_row(row["objective"], row["strategy"], "failed")
            continue
        table.add_row(
            row["objective"], row["strategy"], f"{row['tokens_s']:,.0f}", _share(row.get("efficiency")),
            _share(row["mfu"]), f"{row['step_s']:.3f}", f"{max(row['memory_gib']):.1f}", f"{row['around_s']:.0f} s",
            *_off(row),
        )  # fmt: skip
    console.print(table)
    for row in numbers["resumed"]:
        off = "failed" if "failed" in row else ", ".join(_off(row))
        console.print(f"{row['from']}, then {row['to']} ({row['objective']}): {off}", highlight=False)
    if numbers["left_out"]:
        console.print(f"left out for want of time: {', '.join(numbers['left_out'])}", highlight=False)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _off(row: Mapping[str, Any]) -> tuple[str, str]:
    if "same" not in row:
        return "-", "-"
    off = ", ".join(f"{row[name]:.1e}" for name in ("loss_off", "first_norm_off", "b_off"))
    return off, "yes" if row["same"] else "NO"
