"""`lragent eval report`: recorded results as one page."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `eval report`."""
    parser = commands.add_parser(
        "report",
        help="make a page of recorded results",
        description="Makes one Markdown page, with tables and pictures, of the records of `eval merge`, `eval caches` "
        "and `eval text run`. What no record is about is left out. Pictures go to the folder beside the page that has "
        "its name.",
    )
    parser.add_argument("records", nargs="+", type=Path, metavar="RECORDS", help="JSONL files of records")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE", help="the page to write, such as runs/sharing.md"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Writes page and pictures."""
    from lragent.eval.report.page import write_report

    write_report(args.records, args.output)
    print(f"{args.output}: written, of {len(args.records)} files of records")
    return 0
