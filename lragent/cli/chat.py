"""`lragent chat`: a conversation with the roles of a running server, in the terminal."""

from __future__ import annotations

import argparse
import importlib.util
import io
import os
import sys

from lragent.errors import UserError


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the `chat` command."""
    parser = subparsers.add_parser(
        "chat",
        help="talk with the roles of a running server",
        description="Talks with the roles of a running server; /role lets another one go on with the conversation, and "
        "a line after each answer says how much of it was computed and how much reused. /help lists the commands. "
        "From a pipe, each line is a message or a command, and only answers are printed.",
    )
    flag = parser.add_argument
    flag(
        "--base-url",
        default="http://127.0.0.1:8000/v1",
        metavar="URL",
        help="where it serves OpenAI's API (default: http://127.0.0.1:8000/v1)",
    )
    flag("--api-key", metavar="KEY", help="if it asks for one (default: $LRAGENT_API_KEY, or $OPENAI_API_KEY)")
    flag("--role", metavar="NAME", help="who answers first (default: the first role served)")
    flag("--system", metavar="TEXT", help="system prompt, one for all roles (default: none)")
    flag("--max-tokens", type=int, metavar="N", help="of an answer (default: the server's)")
    flag("--temperature", type=float, metavar="T", help="of an answer; 0 always takes the likeliest token")
    flag("--trajectory-id", metavar="ID", help="sent with each request")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Talks until the lines end; 2 where lines from a pipe could not all be done. Raises `UserError` at the start."""
    if importlib.util.find_spec("openai") is None:
        raise UserError("chat talks by the package openai, which is not installed: pip install 'lragent[eval]'")

    from rich.console import Console

    from lragent.cli.chat_lines import Chat, Screen, complete_lines, typed_lines
    from lragent.cli.conversation import Options, Team

    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a byte that is no text ends no conversation
    key = args.api_key or os.environ.get("LRAGENT_API_KEY") or os.environ.get("OPENAI_API_KEY") or "none"
    team = Team(args.base_url, key, Options(args.max_tokens, args.temperature, args.trajectory_id))
    roles, first = team.roles()
    if args.role is not None and args.role not in roles:
        team.check(args.role)
    typed = sys.stdin.isatty()
    screen = Screen(Console(highlight=False, soft_wrap=True), plain=not typed)
    chat = Chat(team, roles, args.role or first, args.system, screen)
    if not typed:
        chat.run(sys.stdin)
        return 2 if chat.failed else 0
    complete_lines(chat)
    screen.note(f"roles: {', '.join(roles)} · {chat.role} answers · /help lists the commands")
    chat.run(typed_lines(lambda: f"{chat.role}> "))
    return 0
