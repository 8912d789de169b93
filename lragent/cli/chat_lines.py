"""The lines of a chat: messages and commands, one after another, and what is shown for them."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lragent.cli.conversation import Conversation, Team
from lragent.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

HELP = {
    "/role NAME": "let another role answer from now on; the conversation goes on, and so does its cache",
    "/roles": "list the roles",
    "/ask NAME": "let a role speak next, without a message of yours; without NAME, the role that answers now",
    "/tool TEXT": "add a tool's output; nobody answers until you /ask or write",
    "/undo": "take back the last message, with its answer",
    "/save FILE": "write the conversation as a row of training data (JSONL)",
    "/new": "begin anew",
    "/help": "list the commands; a message that begins with / is written with //",
    "/quit": "end, as Ctrl-D does; Ctrl-C stops an answer",
}

_CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
"""What would move the cursor or colour a terminal; a model's text may do neither."""


class Screen:
    """Where a chat appears. Plain: answers alone, as they are, so that a pipe gets nothing else."""

    def __init__(self, console: Console, plain: bool) -> None:
        self._console, self.plain = console, plain

    def piece(self, text: str) -> None:
        """A piece of an answer, shown at once."""
        sys.stdout.write(text if self.plain else text.translate(_CONTROLS))
        sys.stdout.flush()

    def note(self, text: str) -> None:
        """A dim line beside the conversation."""
        if not self.plain:
            self._console.print(text, style="dim", markup=False)

    def tell(self, text: str) -> None:
        """What was asked for."""
        self._console.print(text, markup=False)

    def complain(self, text: str) -> None:
        sys.stdout.flush()
        print(f"error: {text}", file=sys.stderr, flush=True)


class Chat:
    """Takes lines, and lets the team answer. `failed` tells whether any line could not be done."""

    def __init__(self, team: Team, roles: list[str], role: str, system: str | None, screen: Screen) -> None:
        self.role, self.roles, self.failed = role, roles, False
        self._team, self._system, self._screen = team, system, screen
        self._conversation = Conversation(system)
        self._saved: set[Path] = set()
        self._ended = False
        self._commands: dict[str, Callable[[str], None]] = {
            "/role": self._switch,
            "/roles": self._list,
            "/ask": self._ask,
            "/tool": self._tool,
            "/undo": self._undo,
            "/save": self._save,
            "/new": self._new,
            "/help": self._help,
            "/quit": self._quit,
        }

    def run(self, lines: Iterable[str]) -> None:
        """Takes `lines` until they end or one says /quit. What fails is one line, and the chat goes on."""
        for line in lines:
            try:
                self.take(line.strip())
            except UserError as error:
                self.failed = True
                self._screen.complain(str(error))
            except KeyboardInterrupt:
                if self._screen.plain:
                    raise
                self._screen.note("stopped")
            if self._ended:
                return

    def take(self, line: str) -> None:
        """One message or command. Raises `UserError` for what cannot be done; the conversation is as before then."""
        name, _, rest = line.partition(" ")
        if not line:
            return
        if not line.startswith("/") or line.startswith("//"):
            self._answered(self.role, {"role": "user", "content": line.removeprefix("/")})
        elif name in self._commands:
            self._commands[name](rest.strip())
        else:
            raise UserError(f"there is no command {name}; /help lists them.")

    def _answered(self, role: str, message: dict[str, str] | None = None) -> None:
        """Adds `message`, and what `role` says to it."""
        talk, screen = self._conversation, self._screen
        talk.begin()
        if message is not None:
            talk.add(**message)
        elif not talk.messages:
            talk.undo()
            raise UserError("there is nothing to answer yet; write a message first.")
        shown: list[str] = []

        def show(piece: str) -> None:
            shown.append(piece)
            screen.piece(piece)

        try:
            answer = self._team.ask(role, talk.messages, show)
        except UserError:
            talk.undo()
            raise
        finally:
            if shown and not shown[-1].endswith("\n"):
                screen.piece("\n")
        if answer.stopped and screen.plain:
            raise KeyboardInterrupt  # in a pipe it ends everything
        if answer.text or not answer.stopped:
            talk.add("assistant", answer.text, answer.name)
            screen.note(f"{role} · {answer.cost()}")
        else:
            screen.note(f"{role} · stopped before the first token; /ask lets a role answer, /undo takes it back")

    def _known(self, role: str) -> str:
        if role not in self.roles:
            self._team.check(role)  # may know names that it does not list
        return role

    def _switch(self, role: str) -> None:
        if not role:
            raise UserError("/role takes the name of a role; /roles lists them.")
        self.role = self._known(role)
        self._screen.note(f"{role} answers from now on")

    def _list(self, _: str) -> None:
        self.roles, _first = self._team.roles()
        for role in self.roles:
            self._screen.tell(role + (" (answers now)" if role == self.role and not self._screen.plain else ""))

    def _ask(self, role: str) -> None:
        self._answered(self._known(role or self.role))

    def _tool(self, text: str) -> None:
        if not text:
            raise UserError("/tool takes the text that a tool gave.")
        self._conversation.begin()
        self._conversation.add("tool", text)
        self._screen.note("added; /ask lets a role go on")

    def _undo(self, _: str) -> None:
        if not self._conversation.undo():
            raise UserError("there is nothing to take back.")
        self._screen.note(f"taken back; {len(self._conversation.messages)} messages are left")

    def _save(self, name: str) -> None:
        from lragent.atomic import write_file

        if not name:
            raise UserError("/save takes the name of a file.")
        if not self._conversation.messages:
            raise UserError("there is nothing to save yet.")
        path = Path(name).expanduser().absolute()
        if path.exists() and path not in self._saved:
            raise UserError(f"{name} is there already; name a new file.")
        row = json.dumps({"messages": self._conversation.messages}, ensure_ascii=False) + "\n"
        write_file(path, row.encode())
        self._saved.add(path)
        self._screen.note(f"{name}: {len(self._conversation.messages)} messages")

    def _new(self, _: str) -> None:
        self._conversation = Conversation(self._system)
        self._screen.note("a new conversation")

    def _help(self, _: str) -> None:
        for usage, meaning in HELP.items():
            self._screen.tell(f"{usage:<11} {meaning}")

    def _quit(self, _: str) -> None:
        self._ended = True


def typed_lines(prompt: Callable[[], str]) -> Iterator[str]:
    """Lines from a terminal until Ctrl-D; Ctrl-C drops the one being typed."""
    while True:
        try:
            line = input(prompt())
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            continue
        yield line


def complete_lines(chat: Chat) -> None:
    """Gives the prompt a history, and Tab for commands and roles, where Python has readline."""
    with contextlib.suppress(ImportError):
        import readline

        def offer(text: str, state: int) -> str | None:
            offered = offers(readline.get_line_buffer()[: readline.get_begidx()], text, chat.roles)
            return offered[state] if state < len(offered) else None

        readline.set_completer(offer)
        readline.set_completer_delims(" ")
        readline.parse_and_bind("bind ^I rl_complete" if "libedit" in (readline.__doc__ or "") else "tab: complete")


def offers(before: str, text: str, roles: list[str]) -> list[str]:
    """What may stand for `text` on a line that begins with `before`, each followed by a space."""
    if not before.strip():
        words = [usage.split()[0] for usage in HELP] if text.startswith("/") else []
    else:
        words = roles if before.strip() in ("/role", "/ask") else []
    return [f"{word} " for word in words if word.startswith(text)]
