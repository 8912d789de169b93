"""`lragent demo`: train three roles, pack them, serve them, use them."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import FrameType


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the `demo` command."""
    parser = subparsers.add_parser(
        "demo",
        help="train three roles, pack them, serve them from one cache and use them, in minutes",
        description="Makes a world of made-up facts, trains plan, action and reflect with one tied A, packs them, "
        "serves them and lets them answer questions with tools, beside transformers + PEFT. The last line is JSON.",
    )
    flag = parser.add_argument
    flag("--out", type=Path, default=Path("runs/demo"), metavar="DIR", help="where it writes (default: runs/demo)")
    flag("--model", metavar="SPEC", help="hub id, folder or GGUF file (default: the embedded model)")
    flag("--seed", type=int, default=0, help="of the world and the training (default: 0)")
    flag("--minutes", type=float, default=7.0, help="after so many no further question is asked (default: 7)")
    flag("--train-minutes", type=float, default=3.5, help="how many of them are for training (default: 3.5)")
    flag("--shown", type=int, default=3, metavar="N", help="trajectories shown step by step (default: 3)")
    flag("--questions", type=int, metavar="N", help="questions asked (default: as many as there is time for)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the demo; its numbers are the last line. Raises `UserError` for what the arguments ask in vain."""
    from rich.console import Console

    from lragent.eval.children import ChildError
    from lragent.eval.demo import DemoSettings, run_demo

    settings = DemoSettings(
        out=args.out,
        model=args.model,
        seed=args.seed,
        minutes=args.minutes,
        train_minutes=args.train_minutes,
        shown=args.shown,
        questions=args.questions,
    )
    console = Console(width=None if sys.stdout.isatty() else 150)
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        numbers = run_demo(settings, console)
    except ChildError as error:
        console.file.flush()
        if error.tail:
            print(error.tail, file=sys.stderr)
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGTERM, before)
    print(json.dumps(numbers))
    return 0


def _leave(number: int, frame: FrameType | None) -> None:
    """Ends by an exception, so that the programs that the demo started are ended too."""
    sys.exit(128 + number)
