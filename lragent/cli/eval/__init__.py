"""`lragent eval`: what sharing a cache does to answers. A file per subcommand."""

from __future__ import annotations

import argparse
import importlib

PARTS = ("run", "study", "caches", "text", "merge", "report")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the `eval` command and its subcommands."""
    parser = subparsers.add_parser(
        "eval",
        help="measure what sharing a cache does to answers",
        description="What sharing a cache does to the answers of a team.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name in PARTS:
        importlib.import_module(f"lragent.cli.eval.{name}").add_parser(commands)
