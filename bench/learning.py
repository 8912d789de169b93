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
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import set_seed
from rich.console import Console
from rich.table import Table

from lragent.adapter_set import AdapterSet, RoleSpec
from lragent.attention import ATTENTION, register_attention
from lragent.bench import machine
from lragent.chat import Renderer
from lragent.errors import UserError
from lragent.eval.agent import ROLES
from lragent.eval.heal import SERVED, heal_adapters
from lragent.eval.intervals import wilson
from lragent.eval.next_step import next_steps
from lragent.eval.world.generate import EVAL_FILE, TRAIN_FILE, with_counts, write_data_set
from lragent.eval.world.levels import level_named
from lragent.models import load_model, load_tokenizer, resolve_model
from lragent.pack import read_pack, write_pack
from lragent.serve import Engine
from lragent.stacking import stack
from lragent.tied_lora import build_role_model, role_model_from
from lragent.train.data import Example, RoleViews
from lragent.train.distributed import make_accelerator, matrices
from lragent.train.evaluation import EvalScores, evaluate
from lragent.train.examples import load_examples
from lragent.train.loop import DTYPES, fit, train
from lragent.train.role_loss import RoleLoss
from lragent.train.settings import TrainSettings
from lragent.train.tasks import Tasks

REGIMES = {
    "per_role": "per_role, joint A",
    "shared": "shared, joint A",
    "mixed": "mixed, joint A",
    "sequential": "per_role, A by the first role",
    "apart": "trained apart, stacked",
    "healed": "trained apart, stacked, healed",
}
"""By name, for people. `healed` goes on from `apart`."""

HEAL_SHARE = 0.09
"""Of the tokens that the roles were trained on apart: what healing may learn from."""


@dataclass(frozen=True)
class Plan:
    """What every seed is given. Batches are of one step."""

    model: str | None
    level: str
    examples: int
    held_out: int
    generated: int
    epochs: int
    tokens_per_batch: int
    lr: float
    heal_lr: float
    rank: int = 8
    dtype: Literal["bf16", "float32"] = "bf16"


class Lab:
    """One seed: its world, its packs in a folder, and what they are measured by."""

    def __init__(self, plan: Plan, seed: int, folder: Path) -> None:
        self.plan, self.seed, self.folder = plan, seed, folder
        level = with_counts(level_named(plan.level), plan.examples, plan.held_out, 1)
        write_data_set(level, seed, folder / "world")
        self.source = resolve_model(plan.model)
        self.device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        renderer = Renderer(load_tokenizer(self.source))
        common: dict[str, Any] = {"objective": "mixed", "prefix_writer": "base"}
        self.examples = list(load_examples(folder / "world" / TRAIN_FILE, renderer, ROLES, **common))
        self.held_out = list(load_examples(folder / "world" / EVAL_FILE, renderer, ROLES, **common))
        lines = (folder / "world" / EVAL_FILE).read_text(encoding="utf-8").splitlines()
        self.gold = [json.loads(line)["messages"] for line in lines[: plan.generated]]
        register_attention()

    def run(self, regime: str) -> dict[str, Any]:
        """Train and measure one regime: a record."""
        began = time.monotonic()
        pack, facts = getattr(self, f"_{regime}")(self.folder / f"{regime}.safetensors")
        seconds = time.monotonic() - began
        record = {"seed": self.seed, "regime": regime, "plan": dataclasses.asdict(self.plan), **facts}
        record["train_s"] = round(seconds, 1)
        record["predicted"] = self._predicted(read_pack(pack))
        record["generated"] = {mode: self._generated(pack, mode) for mode in SERVED.values()} if self.gold else {}
        record["measure_s"] = round(time.monotonic() - began - seconds, 1)
        return record

    # -- regimes -------------------------------------------------------------------------------------------------

    def _settings(self, objective: str, **more: Any) -> TrainSettings:
        """What all regimes have in common; `out` is for those that write something."""
        plan = self.plan
        return TrainSettings(
            data=self.folder / "world" / TRAIN_FILE, out=self.folder / "run", model=plan.model,
            dtype=plan.dtype, rank=plan.rank, alpha=2.0 * plan.rank, dropout=0.0, epochs=plan.epochs, lr=plan.lr,
            tokens_per_batch=plan.tokens_per_batch, seed=self.seed, compile=False,
            **({"objective": objective, "roles": ROLES} | more),
        )  # fmt: skip

    def _trained(self, pack: Path, settings: TrainSettings) -> tuple[Path, dict[str, Any]]:
        summary = train(settings)
        assert summary is not None, "there is one process"
        Path(summary["pack"]).rename(pack)
        shutil.rmtree(summary["out"])
        return pack, {"tokens": summary["tokens"], "steps": summary["steps"]}

    def _per_role(self, pack: Path) -> tuple[Path, dict[str, Any]]:
        return self._trained(pack, self._settings("per_role"))

    def _shared(self, pack: Path) -> tuple[Path, dict[str, Any]]:
        return self._trained(pack, self._settings("shared"))

    def _mixed(self, pack: Path) -> tuple[Path, dict[str, Any]]:
        return self._trained(pack, self._settings("mixed"))

    def _sequential(self, pack: Path) -> tuple[Path, dict[str, Any]]:
        return self._trained(pack, self._settings("per_role", tying="sequential"))

    def _apart(self, pack: Path) -> tuple[Path, dict[str, Any]]:
        """Every role by itself on its own turns, as PEFT's users do, with an A of its own."""
        singles, tokens, steps = [], 0, 0
        for number, role in enumerate(ROLES, start=1):
            set_seed(1_000 * self.seed + number)
            model = load_model(self.source, DTYPES[self.plan.dtype], self.device, ATTENTION)
            built = build_role_model(model, [role], rank=self.plan.rank, alpha=2.0 * self.plan.rank)
            views = [_as_first(view) for view in RoleViews(self.examples, {number})]
            done = fit(self._settings("per_role", roles=(role,)), built, views)
            shared_a, role_b = matrices(built, done.weights)
            singles.append(
                AdapterSet(
                    base_model=self.source.name,
                    base_fingerprint=self.source.fingerprint(),
                    form="tied",
                    targets=built.targets,
                    roles=(RoleSpec(role, 2.0 * self.plan.rank, self.plan.rank),),
                    shared_a=shared_a,
                    role_b=role_b,
                )
            )
            tokens, steps = tokens + done.result.tokens, steps + done.result.steps
        write_pack(pack, stack(singles))
        return pack, {"tokens": tokens, "steps": steps}

    def _healed(self, pack: Path) -> tuple[Path, dict[str, Any]]:
        """Until the gap is closed on a tenth of the training data, which is kept out for that, or a share of the tokens
        that the roles were trained on is used up."""
        apart = self.folder / "apart.safetensors"
        if not apart.is_file():
            self._apart(apart)
        kept = len(self.examples) // 10
        model = load_model(self.source, DTYPES[self.plan.dtype], self.device, ATTENTION)
        trained = self.plan.epochs * sum(RoleViews(self.examples).lengths)
        healed = heal_adapters(
            read_pack(apart), model, self.examples[kept:], self.examples[:kept], tolerance=0.25, epochs=1,
            lr=self.plan.heal_lr, tokens_per_batch=self.plan.tokens_per_batch, seed=self.seed,
            max_tokens=int(HEAL_SHARE * trained),
        )  # fmt: skip
        write_pack(pack, healed.adapters)
        return pack, {"tokens": healed.tokens, "steps": healed.steps, "closed": healed.closed}

    # -- measures ------------------------------------------------------------------------------------------------

    def _predicted(self, adapters: AdapterSet) -> dict[str, Any]:
        """Right turns and turns of each mode and role, by the trainer."""
        model = load_model(self.source, DTYPES[self.plan.dtype], self.device, ATTENTION)
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
            self.plan.model, pack, sharing=mode, prefix_writer="base" if mode != "non_shared" else None,
            enforce_eager=True, max_tokens_in_cache=131_072,
        ) as engine:  # fmt: skip
            steps = next_steps(engine, self.gold, quiet=True)
        return {"right": dict(steps.right), "turns": dict(steps.total)}


def _as_first(view: Example) -> Example:
    """A role's view as the first role's of a team of one."""
    return dataclasses.replace(view, authors=view.authors.clamp(max=1), roles=view.roles.clamp(max=1))


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
        plan = Plan(
            args.model, args.level, args.examples, args.held_out, args.generated, args.epochs, args.tokens_per_batch,
            args.lr, args.heal_lr, dtype=args.dtype,
        )  # fmt: skip
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
