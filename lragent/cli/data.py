"""`lragent data`: training data looked through, or made from what others have."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from lragent.errors import UserError

MOST_SHOWN = 50
"""Errors that `check` prints; the rest are counted."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the `data` command, with `check` and `convert`."""
    parser = subparsers.add_parser(
        "data", help="check training data, or convert trajectories of others", description="Training data."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_check(commands)
    _add_convert(commands)


def _add_check(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "check",
        help="list every row that cannot be learnt from, and what the others hold",
        description="Reads every row of the data, lists all that is wrong (one line each, with file and line), and "
        "says how many tokens each role authors. Exit status 2 where a row is wrong.",
    )
    flag = parser.add_argument
    flag("data", nargs="+", metavar="DATA", help="JSONL or Parquet file, folder, pattern, or dataset of the hub")
    flag("--roles", default="plan,action,reflect", metavar="NAMES", help="of the roles (default: plan,action,reflect)")
    flag("--model", metavar="SPEC", help="whose tokenizer and chat template (default: the embedded model)")
    flag("--max-length", type=int, metavar="N", help="as in training: cut trajectories off after so many tokens")
    parser.set_defaults(run=run_check)


def _add_convert(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "convert",
        help="make training data from trajectories in another format",
        description="AutoAct's HotpotQA trajectories (`Thought n:`, `Action n: Tool[argument]`, `Observation n:`) "
        "become turns of plan, action and reflect. Actions that are not Tool[argument] are cut out and counted, and so "
        "are rows without an answer that is judged. What the environment says of the answer is never kept.",
    )
    flag = parser.add_argument
    flag("files", nargs="+", type=Path, metavar="FILE", help="a JSON list of rows, or JSONL")
    flag("--from", dest="form", default="autoact", choices=["autoact"], help="their format (default: autoact)")
    flag("-o", "--output", type=Path, required=True, metavar="FILE", help="the JSONL file to write")
    flag("--only", choices=["correct"], help="keep rows whose answer the environment found right (`correct`)")
    flag("--split-turns", action="store_true", help="thought and tool name, reason and verdict, as turns of their own")
    parser.set_defaults(run=run_convert)


def run_check(args: argparse.Namespace) -> int:
    """Prints errors, then a table for each data set."""
    from rich.console import Console

    from lragent.chat import Renderer
    from lragent.models import load_tokenizer, resolve_model
    from lragent.train.check import check

    roles = tuple(name.strip() for name in args.roles.split(",") if name.strip())
    if not roles:
        raise UserError("--roles: name at least one role, for example plan,action,reflect.")
    if args.max_length is not None and args.max_length < 1:
        raise UserError(f"--max-length: must be at least 1, not {args.max_length}.")
    renderer = Renderer(load_tokenizer(resolve_model(args.model)))
    console, wrong = Console(highlight=False, soft_wrap=True), 0
    for spec in args.data:
        report = check(spec, renderer, roles, args.max_length)
        for error in report.errors[:MOST_SHOWN]:
            console.print(error, markup=False)
        if len(report.errors) > MOST_SHOWN:
            console.print(f"… and {len(report.errors) - MOST_SHOWN} more")
        wrong += len(report.errors)
        console.print(
            f"{spec}: {report.rows} rows to learn from, {len(report.errors)} that are wrong; {report.tokens:,} tokens, "
            f"the longest row has {report.longest:,}"
            + (f", {report.cut} are cut off" if args.max_length is not None else ""),
            markup=False,
        )
        authored = sum(report.authored.values())
        for role in roles:
            share = report.authored[role] / authored if authored else 0.0
            console.print(f"  {role}: {report.authored[role]:,} authored tokens ({share:.0%})", markup=False)
        for warning in report.warnings(roles):
            console.print(f"warning: {warning}", markup=False)
    return 2 if wrong else 0


def run_convert(args: argparse.Namespace) -> int:
    """Writes the file and says what was kept and what dropped."""
    from lragent.atomic import write_file
    from lragent.train.autoact import Converted, convert, read_autoact
    from lragent.trajectories import read_row

    counts, lines = Converted(), []
    for path in args.files:
        rows = convert(
            read_autoact(path), only_correct=args.only == "correct", split_turns=args.split_turns, counts=counts
        )
        for row in rows:
            read_row(row, ("plan", "action", "reflect"), source=f"{path}: what was made of it")
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    if not lines:
        raise UserError(f"{args.files[0]}: no row makes a trajectory; are these AutoAct's `question` and `prompt`?")
    write_file(args.output, "".join(lines).encode())
    print(f"{args.output}: {counts.kept} trajectories of {counts.rows} rows")
    for reason, count in counts.dropped.most_common():
        print(f"  {count} rows dropped: {reason}")
    for reason, count in counts.cut_steps.most_common():
        print(f"  {count} of {counts.steps} steps cut out: {reason}")
    return 0
