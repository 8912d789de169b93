"""`lragent eval run`: a team of roles examined on a test world, in sharing modes or through an endpoint."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lragent.errors import UserError

if TYPE_CHECKING:
    from lragent.eval.agent import Episode
    from lragent.eval.run_folder import RunFolder

ENDPOINT = "endpoint"
"""What stands for the sharing mode where a server has chosen it."""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `eval run`."""
    parser = commands.add_parser(
        "run",
        help="ask a team the questions of a test world",
        description="Plays the agent loop (plan, action, tools, reflect) over a test world that `lragent world` wrote, "
        "with an engine in this process for each sharing mode, or with any OpenAI endpoint whose models are called "
        "plan, action and reflect. The same command goes on where it was interrupted.",
    )
    flag = parser.add_argument
    flag("--world", type=Path, required=True, metavar="FILE", help="test_world.json")
    flag("--roles", type=Path, metavar="PACK", help="the team")
    flag(
        "--base-url", metavar="URL", help="instead of --roles: of an OpenAI endpoint, such as http://127.0.0.1:8000/v1"
    )
    flag("--api-key", default="none", metavar="KEY", help="of the endpoint")
    flag("--modes", default="non_shared,base_lr_shared", metavar="NAMES", help="(default: non_shared,base_lr_shared)")
    flag("--model", metavar="SPEC", help="hub id, folder or GGUF file (default: the embedded model)")
    flag("--questions", type=int, metavar="N", help="the first N (default: all)")
    flag("--workers", type=int, default=16, metavar="N", help="questions at once (default: 16; 1 to measure times)")
    flag("--iterations", type=int, default=45, metavar="N", help="of one question at most (default: 45)")
    flag("--max-tokens-in-cache", type=int, metavar="N", help="of the engine (default: what fits)")
    flag("--max-num-batched-tokens", type=int, metavar="N", help="of one of its steps (default: what suits it)")
    flag("--trajectories", action="store_true", help="keep the messages as well, as trajectories/MODE.jsonl")
    flag("-o", "--output", type=Path, required=True, metavar="DIR", help="for the answers, a file for each mode")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Asks and prints the table."""
    from rich.console import Console
    from tqdm import tqdm

    from lragent.eval.answers import AnswerFile
    from lragent.eval.ask import Asking, ask, served, unanswered
    from lragent.eval.comparison import show
    from lragent.eval.openai_client import openai_endpoint
    from lragent.eval.run_folder import RunFolder
    from lragent.eval.world.testset import load_test_set
    from lragent.modes import SharingMode

    if (args.roles is None) == (args.base_url is None):
        raise UserError("--roles: give a pack, or --base-url for a server that runs; one of the two.")
    if args.roles is not None and not args.roles.is_file():
        raise UserError(f"--roles: there is no file {args.roles}; give a pack, as `lragent pack` writes it.")
    if args.output.exists() and not args.output.is_dir():
        raise UserError(f"--output: {args.output} is a file; name a folder.")
    modes = [ENDPOINT] if args.base_url else [name.strip() for name in args.modes.split(",")]
    for name in modes:
        if not args.base_url and name not in list(SharingMode):
            raise UserError(f"--modes: there is no {name!r}; there are {', '.join(SharingMode)}.")
    asking = Asking(args.workers, args.iterations, args.max_tokens_in_cache, args.max_num_batched_tokens)
    test = load_test_set(args.world)
    count = len(test.questions) if args.questions is None else args.questions
    if not 1 <= count <= len(test.questions):
        raise UserError(f"--questions: must be from 1 to the world's {len(test.questions)}, not {args.questions}.")
    folder = RunFolder(args.output)
    folder.begin(args.world, test.level, args.roles or args.base_url, args.iterations)
    for mode in modes:
        with (
            AnswerFile(folder.answers(mode)) as file,
            tqdm(desc=mode, total=count, initial=len(file.answers), unit="q", disable=None) as bar,
        ):
            if unanswered(test, count, file):
                folder.note(mode, args.workers, here=args.roles is not None)
                speaker = (
                    openai_endpoint(args.base_url, args.api_key)
                    if args.base_url
                    else served(args.model, args.roles, SharingMode(mode), asking)
                )
                with speaker as complete:
                    ended = partial(_ended, bar, folder if args.trajectories else None, mode)
                    ask(test, count, complete, file, asking, on_answer=ended)
    show({mode: folder.answers(mode) for mode in modes}, Console(highlight=False, soft_wrap=True))
    return 0


def _ended(bar: Any, keeper: RunFolder | None, mode: str, answer: object, episode: Episode) -> None:
    bar.update()
    if keeper is not None:
        keeper.keep(mode, episode.messages)
