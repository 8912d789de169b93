"""The oracle: a `Complete` that knows the facts.

What the agent loop records while the oracle answers is a gold trajectory, so training data has by construction the form
that the loop produces with a model.
"""

import random
from collections.abc import Generator, Iterator
from dataclasses import dataclass

from lragent.errors import LRAgentError
from lragent.eval.agent import ACTION, FINISH, PLAN, REFLECT, RIGHT, WRONG, Message, Reply
from lragent.eval.world.form import Form
from lragent.eval.world.pages import World
from lragent.eval.world.questions import OPEN_HOPS, Path, Question
from lragent.eval.world.tools import LOOKUP, SEARCH


@dataclass(frozen=True)
class _Turn:
    role: str
    text: str
    mistaken: bool = False


_Script = Generator[_Turn, str, None]
"""Yields the next turn; is sent the text of the message before the turn that follows it."""


class Oracle:
    """Plays all three roles for one question, without error, or with one wrong first answer that reflect sends back.

    A wrong answer is one that the trajectory itself shows to be wrong: to an open question, the value of an earlier
    relation than the one asked for; to the others, the opposite of what the two values say.
    """

    def __init__(
        self, world: World, question: Question, form: Form, wrong_first: bool = False, rng: random.Random | None = None
    ) -> None:
        """`rng` chooses after which relation a wrong answer is given; the first one when it is None.

        `mistaken` says of each turn given so far whether it is part of a deliberate mistake.
        """
        self.mistaken: list[bool] = []
        self._world, self._question, self._form = world, question, form
        is_open = question.kind in OPEN_HOPS
        self._early = -1
        if wrong_first and is_open:
            hops = len(question.paths[0].nouns)
            self._early = rng.randrange(hops - 1) if rng else 0
        self._script = self._answer_open() if is_open else self._answer_pair(wrong_first)
        self._started = False

    def __call__(self, role: str, messages: list[Message], max_tokens: int) -> Reply:
        if self._started:
            turn = self._script.send(messages[-1]["content"])
        else:
            turn = next(self._script)
            self._started = True
        if turn.role != role:
            raise LRAgentError(f"The oracle has a turn of {turn.role} ready, the loop asks {role}.")
        self.mistaken.append(turn.mistaken)
        return Reply(turn.text)

    def _answer_open(self) -> _Script:
        (path,) = self._question.paths
        names = self._world.follow(path.start, path.nouns)
        told = ""
        for depth, noun in enumerate(path.nouns):
            yield from self._read(told, names[depth], noun)
            told = f"The {noun} is {names[depth + 1]}. "
            if depth == self._early:
                yield from self._finish(told, names[depth + 1], f"Asked {path.nouns[-1]}, got {noun}.", WRONG)
                told = ""
        yield from self._finish(told, names[-1], f"Asked {path.nouns[-1]}, got {path.nouns[-1]}.", RIGHT)

    def _answer_pair(self, wrong_first: bool) -> _Script:
        told = ""
        ends: list[str] = []
        for path in self._question.paths:
            names = self._world.follow(path.start, path.nouns)
            for depth, noun in enumerate(path.nouns):
                yield from self._read(told, names[depth], noun)
                told = f"The {noun} is {names[depth + 1]}. "
            ends.append(names[-1])
        values, answer = ", ".join(ends), self._question.answer
        if wrong_first:
            wrong = self._opposite()
            yield from self._finish(f"{told}{values}: {wrong}.", wrong, f"{values}: {answer}, got {wrong}.", WRONG)
            told = ""
        yield from self._finish(f"{told}{values}: {answer}.", answer, f"{values}: {answer}, got {answer}.", RIGHT)

    def _opposite(self) -> str:
        if self._question.kind == "yes_no":
            return "no" if self._question.answer == "yes" else "yes"
        candidates = [self._compared(path) for path in self._question.paths]
        return next(name for name in candidates if name != self._question.answer)

    def _compared(self, path: Path) -> str:
        return self._world.follow(path.start, path.nouns)[-2]

    def _read(self, told: str, title: str, noun: str) -> _Script:
        """Finds the page of `title`, and looks in it until the sentence with `noun` has been shown."""
        page = self._world.pages[title]
        sentence = page.sentences[page.facts[noun].sentence]
        yield from self._say(PLAN, f"{told}Need the {noun} of {title}.", SEARCH)
        shown = yield _Turn(ACTION, title)
        while sentence not in shown:
            yield from self._say(PLAN, f"No {noun} of {title}.", LOOKUP)
            shown = yield _Turn(ACTION, noun)

    def _finish(self, told: str, answer: str, reason: str, verdict: str) -> _Script:
        mistaken = verdict == WRONG
        yield from self._say(PLAN, told.strip(), FINISH, mistaken)
        yield _Turn(ACTION, answer, mistaken)
        yield from self._say(REFLECT, reason, verdict)

    def _say(self, role: str, reason: str, decision: str, mistaken: bool = False) -> Iterator[_Turn]:
        texts = [reason, decision] if self._form.split_turns else [f"{reason} {decision}"]
        for text in texts:
            yield _Turn(role, text, mistaken)
