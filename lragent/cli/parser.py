"""The parser of every command: what it cannot read is said in two lines, with the nearest option that there is."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """argparse's, without abbreviations (a new option would change what they mean) and without pages of usage.

    Commands added to it are of this class too.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **({"allow_abbrev": False} | kwargs))

    def parse_known_args(  # type: ignore[override]  # argparse has overloads, for namespaces of other classes
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """As argparse's, but nothing stays unknown: a command names it, where argparse would leave it to its parent."""
        words = list(sys.argv[1:] if args is None else args)
        self._refuse_unknown_options(words)
        parsed, unknown = super().parse_known_args(words, namespace)
        if unknown:
            word = unknown[0]
            self.error(self._unknown(word) if word.startswith("-") else f"unexpected argument {word}")
        return parsed, []

    def error(self, message: str) -> NoReturn:
        """Ends with exit status 2, as argparse does."""
        listed = "options" if self._subparsers is None else "commands"
        self.exit(2, f"error: {self.prog}: {message}\n{self.prog} --help lists the {listed}.\n")

    def _refuse_unknown_options(self, words: list[str]) -> None:
        """Before argparse looks: it would first ask for what is missing, which a misspelt option may have given."""
        for word in words:
            if word == "--" or not (self._subparsers is None or word.startswith("-")):  # what follows is the command's
                return
            if word.startswith("--") and " " not in word and word.partition("=")[0] not in self._option_string_actions:
                self.error(self._unknown(word))

    def _unknown(self, word: str) -> str:
        name = word.partition("=")[0]
        nearest = difflib.get_close_matches(name, self._option_string_actions, n=1)
        return f"unknown option {name}" + (f"; did you mean {nearest[0]}?" if nearest else "")
