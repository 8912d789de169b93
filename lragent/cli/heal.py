"""`lragent heal`: adapters that were trained apart, made at home in one shared cache."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the `heal` command."""
    parser = subparsers.add_parser(
        "heal",
        help="train a pack of adapters that were trained apart a little, for one shared cache",
        description="Trains a stacked pack (or one trained per role) as `base_lr_shared` will serve it, until its "
        "roles predict as many turns there as they did alone. Writes a healed pack, PEFT folders and a report of "
        "losses and next-step accuracy, before and after.",
    )
    flag = parser.add_argument
    flag("pack", type=Path, metavar="PACK", help="made by `lragent pack --stack`, or by training")
    flag("--data", type=Path, required=True, metavar="FILE", help="trajectories of all roles (JSONL or Parquet)")
    flag("-o", "--output", type=Path, required=True, metavar="DIR", help="a new folder for what is healed")
    flag("--model", metavar="SPEC", help="hub id, folder or GGUF file (default: the embedded model)")
    flag("--eval-data", type=Path, metavar="FILE", help="trajectories to measure on (default: every tenth of the data)")
    flag(
        "--tolerance",
        type=float,
        default=1.0,
        metavar="POINTS",
        help="of next-step accuracy below which a gap counts as closed (default: 1)",
    )
    flag("--epochs", type=int, default=1, metavar="N", help="at most so often over the data (default: 1)")
    flag("--max-tokens", type=int, metavar="N", help="learn from so many at most (default: what --epochs says)")
    flag("--lr", type=float, default=1e-3, help="highest learning rate (default: 1e-3)")
    flag("--tokens-per-batch", type=int, default=4096, metavar="N", help="of one step (default: 4096)")
    flag("--max-length", type=int, metavar="N", help="cut trajectories off after so many tokens")
    flag(
        "--generated",
        type=int,
        default=50,
        metavar="N",
        help="held-out trajectories whose turns the engine generates in the end (default: 50)",
    )
    flag("--seed", type=int, default=0)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Heals and prints what it did; 0 also where the gap was not closed, which is said."""
    from rich.console import Console

    from lragent.eval.heal import PACK, HealSettings, heal

    settings = HealSettings(
        pack=args.pack,
        data=args.data,
        out=args.output,
        model=args.model,
        eval_data=args.eval_data,
        tolerance=args.tolerance,
        epochs=args.epochs,
        max_tokens=args.max_tokens,
        lr=args.lr,
        tokens_per_batch=args.tokens_per_batch,
        max_length=args.max_length,
        generated=args.generated,
        seed=args.seed,
    )
    console = Console(highlight=False, soft_wrap=True, width=None if Console().is_terminal else 160)
    report = heal(settings, console.print)
    console.print(_table(report))
    if report["closed"]:
        verdict = "The gap is closed"
    else:
        verdict = "The gap is NOT closed: give more data or --epochs, or another --lr"
    console.print(f"{verdict}; {report['tokens']:,} tokens in {report['seconds']:.0f} s.")
    console.print(f"lragent serve --roles {settings.out / PACK}")
    return 0


def _table(report: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(title="held-out turns predicted exactly, and loss per token")
    for name in ("served as", "role", "before", "loss", "after", "loss"):
        table.add_column(name, justify="left" if name in ("served as", "role") else "right")
    for mode, by_role in report["before"].items():
        for role, before in by_role.items():
            cells = []
            for found in (before, report["after"][mode][role]):
                low, high = found["interval"]
                share = found["right"] / found["turns"]
                cells += [f"{share:.1%} ({low:.1%} to {high:.1%})", f"{found['loss']:.3f}"]
            table.add_row(mode, role, *cells)
        table.add_section()
    for when, by_mode in report.get("generated", {}).items():
        for mode, found in by_mode.items():
            right, turns = sum(found["right"].values()), sum(found["turns"].values())
            share = f"{found['accuracy']:.1%} ({right} of {turns})"
            table.add_row(mode, "all, generated", *([share, "", "", ""] if when == "before" else ["", "", share, ""]))
    return table
