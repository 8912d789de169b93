"""`python -m lragent.bench learning`: what sharing costs, and how training and healing give it back.

Roles of the multi-hop world are trained in several ways and each pack is measured in two sharing modes: how many turns
of unseen trajectories are predicted exactly. Twice: by the trainer, which takes each token after the gold ones before
it, for all held-out trajectories; and by the real engine, which generates every turn, for `--generated` of them.
Finished cells are appended to `--records`, and are not run again; `--merge` makes one table of several such files.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from lragent.adapter_set import AdapterSet
from lragent.attention import ATTENTION
from lragent.bench import machine
from lragent.errors import UserError
from lragent.eval.agent import ROLES
from lragent.eval.heal import SERVED
from lragent.eval.intervals import wilson
from lragent.eval.next_step import next_steps
from lragent.eval.study.regimes import REGIMES, Teacher, Training
from lragent.eval.world.generate import EVAL_FILE, TRAIN_FILE, with_counts, write_data_set
from lragent.eval.world.levels import level_named
from lragent.models import load_model
from lragent.pack import read_pack
from lragent.serve import Engine
from lragent.tied_lora import role_model_from
from lragent.train.distributed import make_accelerator
from lragent.train.evaluation import EvalScores, evaluate
from lragent.train.loop import DTYPES
from lragent.train.role_loss import RoleLoss
from lragent.train.tasks import Tasks


@dataclass(frozen=True)
class Plan:
    """What every seed is given."""

    level: str
    examples: int
    held_out: int
    generated: int
    training: Training


class Lab:
    """One seed: its world, its packs in a folder, and what they are measured by."""

    def __init__(self, plan: Plan, seed: int, folder: Path) -> None:
        self.plan, self.seed, self.folder = plan, seed, folder
        level = with_counts(level_named(plan.level), plan.examples, plan.held_out, 1)
        write_data_set(level, seed, folder / "world")
        self.teacher = Teacher(plan.training, folder / "world" / TRAIN_FILE, seed, folder)
        self.held_out = self.teacher.load(folder / "world" / EVAL_FILE)
        lines = (folder / "world" / EVAL_FILE).read_text(encoding="utf-8").splitlines()
        self.gold = [json.loads(line)["messages"] for line in lines[: plan.generated]]

    def run(self, regime: str) -> dict[str, Any]:
        """Train and measure one regime: a record."""
        pack = self.folder / f"{regime}.safetensors"
        facts = self.teacher.train(regime, pack)
        began = time.monotonic()
        record = {"seed": self.seed, "regime": regime, "plan": dataclasses.asdict(self.plan), **facts}
        record["train_s"] = record.pop("seconds")
        record["predicted"] = self._predicted(read_pack(pack))
        record["generated"] = {mode: self._generated(pack, mode) for mode in SERVED.values()} if self.gold else {}
        record["measure_s"] = round(time.monotonic() - began, 1)
        return record

    def _predicted(self, adapters: AdapterSet) -> dict[str, Any]:
        """Right turns and turns of each mode and role, by the trainer."""
        teacher = self.teacher
        model = load_model(teacher.source, DTYPES[self.plan.training.dtype], teacher.device, ATTENTION)
        built = role_model_from(model, adapters)
        tasks = Tasks("mixed", self.held_out, tokens_per_batch=16_384, batches_per_step=1, seed=0).one_epoch()
        scores: EvalScores = evaluate(RoleLoss(built), tasks, ROLES, make_accelerator())
        return {
            mode: {"right": scores.right[kind], "turns": scores.turns[kind], "loss": scores.losses[kind]}
            for kind, mode in SERVED.items()
        }

    def _generated(self, pack: Path, mode: str) -> dict[str, Any]:
        """The same, by the engine."""
        with Engine(
            self.plan.training.model, pack, sharing=mode, prefix_writer="base" if mode != "non_shared" else None,
            enforce_eager=True, max_tokens_in_cache=131_072,
        ) as engine:  # fmt: skip
            steps = next_steps(engine, self.gold, quiet=True)
        return {"right": dict(steps.right), "turns": dict(steps.total)}


def records_of(path: Path) -> list[dict[str, Any]]:
    """The records in a file, if it is there."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def run_cells(
    plan: Plan, seeds: Sequence[int], regimes: Sequence[str], path: Path, deadline: float, tell: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """Every cell that `path` lacks, until `deadline` (of `time.monotonic`); each is appended there when it is done."""
    done = {(record["seed"], record["regime"]) for record in records_of(path)}
    for seed in seeds:
        todo = [regime for regime in regimes if (seed, regime) not in done]
        if not todo:
            continue
        with tempfile.TemporaryDirectory(prefix="learning-") as folder:
            lab = Lab(plan, seed, Path(folder))
            for regime in todo:
                if time.monotonic() > deadline:
                    tell("the time is up; the same command goes on with what is left")
                    return
                record = lab.run(regime)
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
                shares = {mode: _share(part) for mode, part in record["predicted"].items()}
                tell(f"seed {seed}, {regime}: {shares}, {record['tokens']:,} tokens in {record['train_s']} s")
                yield record


def _share(part: dict[str, Any]) -> float:
    return round(100 * part["right"]["all"] / part["turns"]["all"], 1)


def summary(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each regime: shares pooled over seeds with their 95% intervals, and the spread of the seeds."""
    rows = []
    for regime, words in REGIMES.items():
        cells = [record for record in records if record["regime"] == regime]
        if not cells:
            continue
        row: dict[str, Any] = {
            "regime": regime, "what": words, "seeds": sorted(cell["seed"] for cell in cells),
            "tokens": statistics.mean(cell["tokens"] for cell in cells),
        }  # fmt: skip
        for way in ("predicted", "generated"):
            for mode in SERVED.values():
                parts = [cell[way][mode] for cell in cells if mode in cell[way]]
                if not parts:
                    continue
                right = [sum(v for k, v in part["right"].items() if k != "all") for part in parts]
                turns = [sum(v for k, v in part["turns"].items() if k != "all") for part in parts]
                low, high = wilson(sum(right), sum(turns))
                each = [100 * r / n for r, n in zip(right, turns, strict=True)]
                row[f"{way} {mode}"] = {
                    "share": 100 * sum(right) / sum(turns), "interval": [100 * low, 100 * high], "seeds": each,
                    "turns": sum(turns),
                }  # fmt: skip
        rows.append(row)
    by_name = {row["regime"]: row for row in rows}
    if {"apart", "healed"} <= by_name.keys():
        apart, healed = by_name["apart"], by_name["healed"]
        wanted, had = (apart[f"predicted {mode}"]["share"] for mode in ("non_shared", "base_lr_shared"))
        if wanted > had:
            healed["gap_closed"] = (healed["predicted base_lr_shared"]["share"] - had) / (wanted - had)
        healed["share_of_tokens"] = healed["tokens"] / apart["tokens"]
    return rows


def show(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """The rows as a table."""
    table = Table(title="turns of unseen trajectories predicted exactly, in percent, with 95% intervals over all seeds")
    names = [f"{way} {mode}" for way in ("predicted", "generated") for mode in SERVED.values()]
    for name in ("trained", "tokens", *names):
        table.add_column(name, justify="left" if name == "trained" else "right")
    for row in rows:
        cells = []
        for name in names:
            cell = row.get(name)
            cells.append("-" if cell is None else "{:.1f} ({:.1f} to {:.1f})".format(cell["share"], *cell["interval"]))
        table.add_row(row["what"], f"{row['tokens'] / 1e6:.2f} M", *cells)
    console.print(table)
    for row in rows:
        if "gap_closed" in row:
            console.print(
                f"healing closes {row['gap_closed']:.0%} of the gap with {row['share_of_tokens']:.1%} of the tokens",
                highlight=False,
            )


def main(argv: Sequence[str]) -> int:
    """Run what is missing, print the table and the numbers."""
    parser = argparse.ArgumentParser(
        prog="python -m lragent.bench learning", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    flag = parser.add_argument
    flag("--seeds", default="0,1,2", help="seeds, separated by commas (0,1,2)")
    flag("--regimes", default=",".join(REGIMES), help=f"ways to train ({','.join(REGIMES)})")
    flag("--records", type=Path, default=Path("learning.jsonl"), metavar="FILE", help="where finished cells stand")
    flag("--merge", type=Path, nargs="+", metavar="FILE", help="train nothing: make one table of these records")
    flag("--model", metavar="SPEC", help="hub id, folder or GGUF file (default: the embedded model)")
    flag("--level", default="easy", help="of the multi-hop world (easy)")
    flag("--examples", type=int, default=1_000, metavar="N", help="trajectories to train on (1000)")
    flag("--held-out", type=int, default=300, metavar="N", help="trajectories to measure on (300)")
    flag("--generated", type=int, default=100, metavar="N", help="of them, those that the engine generates (100)")
    flag("--epochs", type=int, default=3, metavar="N")
    flag("--tokens-per-batch", type=int, default=4_096, metavar="N", help="of one step (4096)")
    flag("--lr", type=float, default=2e-3)
    flag("--heal-lr", type=float, default=1e-3)
    flag("--dtype", default="bf16", choices=("bf16", "float32"))
    flag("--time-limit", type=float, metavar="SECONDS", help="begin no cell after so long")
    flag("--no-save", action="store_true", help="write nothing to bench/results/")
    args = parser.parse_args(argv)
    console = Console(width=None if Console().is_terminal else 200)
    regimes = args.regimes.split(",")
    if unknown := sorted(set(regimes) - set(REGIMES)):
        raise UserError(f"--regimes: there is no {unknown[0]!r}; there are {', '.join(REGIMES)}.")
    if args.merge:
        records = [record for path in args.merge for record in records_of(path)]
    else:
        training = Training(
            model=args.model, dtype=args.dtype, epochs=args.epochs, tokens_per_batch=args.tokens_per_batch, lr=args.lr,
            heal_lr=args.heal_lr,
        )  # fmt: skip
        plan = Plan(args.level, args.examples, args.held_out, args.generated, training)
        deadline = time.monotonic() + (args.time_limit or float("inf"))
        seeds = [int(seed) for seed in args.seeds.split(",")]
        for _ in run_cells(plan, seeds, regimes, args.records, deadline, console.print):
            pass
        records = records_of(args.records)
    if not records:
        raise UserError("learning: there are no records.")
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    numbers = {"benchmark": "learning", **machine.facts(device), "rows": summary(records), "cells": records}
    show(numbers["rows"], console)
    if not args.no_save:
        console.print(f"saved to {machine.save('learning', numbers)}", highlight=False)
    print(json.dumps(numbers["rows"]))
    return 0
