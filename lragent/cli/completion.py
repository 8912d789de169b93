"""`lragent completion`: commands, options and files at the press of Tab."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

SHELLS = ("bash", "zsh", "tcsh")
FILES = ("FILE", "PACK", "DATA", "SPEC")
FOLDERS = ("DIR",)
"""What `metavar` says of arguments that name files or folders."""

HOW_TO = """\
To have it in every new shell, add one line to
  ~/.bashrc  eval "$(lragent completion bash)"
  ~/.zshrc   eval "$(lragent completion zsh)"         after compinit
  ~/.tcshrc  source ~/.lragent.csh                    made by lragent completion tcsh > ~/.lragent.csh
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the `completion` command."""
    parser = subparsers.add_parser(
        "completion",
        help="print a script by which your shell completes this command",
        description="Prints a script that completes commands, options and files.",
        epilog=HOW_TO,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help=", ".join(SHELLS))
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints the script, made from the parser of the whole command line."""
    import shtab

    from lragent.cli.main import build_parser

    parser = build_parser()
    for action in _actions(parser):
        if action.metavar in FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]  # how shtab is told
        elif action.metavar in FOLDERS:
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
    print(shtab.complete(parser, args.shell))
    return 0


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Every argument of `parser` and of the commands below it."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
        else:
            yield action
