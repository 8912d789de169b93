"""`lragent eval merge`: folders of studies and runs as one file of records."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `eval merge`."""
    parser = commands.add_parser(
        "merge",
        help="put folders of studies and runs together in one file of records",
        description="Reads folders of `lragent eval study` and `lragent eval run` and writes what they found as one "
        "small JSONL file, which `lragent eval report` makes a page of: right or wrong for every question, and means.",
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the JSONL file to write")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Writes the file and prints the table of what studies it holds."""

    from rich.console import Console

    from lragent.eval.records import write_records
    from lragent.eval.report.recorded import merged
    from lragent.eval.study.table import show

    records = merged(args.folders, print)
    write_records(args.output, records)
    if any(record["kind"] == "answers" for record in records):
        show(records, Console(highlight=False, soft_wrap=True))
    print(f"{args.output}: {len(records)} records")
    return 0
