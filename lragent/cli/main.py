"""The command `lragent`.

Each subcommand is a module of `lragent.cli` with `add_parser(subparsers)`, which sets `run`: a function from the parsed
arguments to an exit status. Heavy libraries are imported inside `run`, so that `lragent --help` is instant.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Sequence

import lragent
from lragent.cli.parser import Parser
from lragent.errors import UserError

COMMANDS = ("demo", "serve", "pack", "unpack", "inspect", "data", "heal", "eval", "world", "chat", "completion")


def build_parser() -> Parser:
    """The parser of the whole command line."""
    parser = Parser(
        prog="lragent",
        description="One decomposed KV cache for a team of LoRA roles, trained with a tied A and served as one team.",
    )
    parser.add_argument("--version", action="version", version=f"lragent {lragent.__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for name in COMMANDS:
        importlib.import_module(f"lragent.cli.{name}").add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Exit status: 0 when it did its work, 2 for bad input (one sentence on stderr), 130 for Ctrl-C.

    Anything else that goes wrong is a bug, and shows its traceback.
    """
    args = build_parser().parse_args(argv)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = show_warning  # type: ignore[assignment]  # takes them all, by position
            status: int = args.run(args)
            sys.stdout.flush()
            return status
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `lragent inspect … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def show_warning(message: Warning | str, category: type[Warning], *_: object) -> None:
    """Our own warnings as one line; those of libraries are meant for programmers, and are left out."""
    if category.__module__.partition(".")[0] == "lragent":
        print(f"warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
