"""`lragent eval study`: ways of training by sharing modes by seeds."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from lragent.errors import UserError


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `eval study`."""
    parser = commands.add_parser(
        "study",
        help="train roles in several ways and ask each in every sharing mode",
        description="Writes worlds, trains roles in every way of the plan, and has them answer the test questions "
        "with tools, in every sharing mode. What is done already is not done again, so a study can be made in parts; "
        "seeds may be made on different machines (`seeds=[1]`) and put together by `lragent eval merge`.",
    )
    flag = parser.add_argument
    flag("overrides", nargs="*", metavar="KEY=VALUE", help="fields of the plan, such as questions=500 training.lr=1e-3")
    flag("--plan", type=Path, metavar="FILE", help="YAML, such as configs/eval/small.yaml (default: the fields' own)")
    flag("-o", "--output", type=Path, required=True, metavar="DIR", help="the study's folder, new or begun")
    flag("--processes", type=int, default=1, metavar="N", help="side by side, on one GPU as well (default: 1)")
    flag("--minutes", type=float, metavar="M", help="begin nothing after so long; the same command goes on")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Works, and prints the table so far. Exit status 3 where the time ran out before all was done."""
    began = time.monotonic()

    from rich.console import Console

    from lragent.config import load_config
    from lragent.eval.study.merge import records_of
    from lragent.eval.study.plan import StudyPlan
    from lragent.eval.study.table import show
    from lragent.eval.study.work import run_study
    from lragent.train.interrupt import InterruptedRun

    if args.processes < 1:
        raise UserError(f"--processes: must be at least 1, not {args.processes}.")
    if args.minutes is not None and not args.minutes > 0:
        raise UserError(f"--minutes: must be above 0, not {args.minutes:g}.")
    plan = load_config(StudyPlan, args.plan, args.overrides)
    console = Console(highlight=False, soft_wrap=True)
    try:
        whole = run_study(
            plan,
            args.output,
            processes=args.processes,
            deadline=began + 60 * args.minutes if args.minutes else float("inf"),
            tell=lambda sentence: console.print(sentence, markup=False),
        )
    except InterruptedRun as interrupted:  # in training, which kept what it had learnt
        console.print("interrupted; the same command goes on with what is left")
        return 128 + interrupted.number
    show(records_of([args.output], console.print), console)
    if not whole:
        console.print("the time is up; the same command goes on with what is left")
    return 0 if whole else 3
