"""The agent loop of the paper: plan names a tool, action gives its argument, the tool answers, reflect judges answers.

Whoever generates text is behind `Complete`, so the same loop drives an OpenAI endpoint, an engine in this process,
transformers, or the oracle.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from lragent.errors import LRAgentError
from lragent.eval.world.form import Form

PLAN, ACTION, REFLECT = "plan", "action", "reflect"
ROLES = (PLAN, ACTION, REFLECT)
RIGHT, WRONG = "right", "wrong"
FINISH = "Finish"
"""The tool that every desk has and none answers: its argument is the team's answer, which reflect judges."""

Message = dict[str, str]
"""An OpenAI message; assistant messages carry the role's name in `name`."""


class OutOfContextError(LRAgentError):
    """Raised by a `Complete` when the trajectory no longer fits the model's context."""


@dataclass(frozen=True)
class Reply:
    """What one turn's generation gave and cost. Counts are tokens; None where the backend does not tell."""

    text: str
    prompt_tokens: int | None = None
    generated_tokens: int | None = None
    tokens_computed: int | None = None
    """Prompt tokens that went through the model in this turn."""
    tokens_reused: int | None = None
    """Prompt tokens whose base (or full) cache was found."""
    lr_reused: int | None = None
    """Prompt tokens whose LR cache was found as well."""
    ttft_s: float | None = None
    """Seconds until the first token, as the caller sees it."""
    total_s: float | None = None


class Complete(Protocol):
    """Generates the next turn of `role` after `messages`, which it does not change. Raises `OutOfContextError`."""

    def __call__(self, role: str, messages: list[Message], max_tokens: int) -> Reply: ...


class Desk(Protocol):
    """The tools of one trajectory; it may remember what was found last."""

    @property
    def tools(self) -> Sequence[str]:
        """Their names as plan says them, `FINISH` among them."""
        ...

    def call(self, tool: str, argument: str) -> str:
        """What the tool says. Never raises on what a model wrote: it says what is wrong."""
        ...


@dataclass(frozen=True)
class Step:
    """One turn as it happened. `role` is `plan`, `action`, `reflect` or `tool`; tools have no `reply`."""

    role: str
    text: str
    reply: Reply | None = None


class Ending(StrEnum):
    """Why a trajectory ended. All but the first are out of function: they give no answer."""

    ACCEPTED = "accepted"
    ITERATIONS = "iterations"
    CONTEXT = "context"


def _default_max_tokens() -> dict[str, int]:
    return {PLAN: 48, ACTION: 16, REFLECT: 32}


@dataclass(frozen=True)
class Limits:
    """When to give up. One iteration is one decision of plan and what follows from it."""

    iterations: int = 45
    max_tokens: Mapping[str, int] = field(default_factory=_default_max_tokens)
    """Per role, the most tokens of one turn."""


class Episode:
    """One question asked to the team. Iterate to watch the steps as they happen, or call `run`.

    Owns `messages` (the trajectory so far), `steps`, and after the end `ending` and, if accepted, `answer`.
    """

    def __init__(self, question: str, desk: Desk, complete: Complete, form: Form, limits: Limits | None = None) -> None:
        self.messages: list[Message] = [{"role": "system", "content": form.system}] if form.system else []
        self.messages.append({"role": "user", "content": question})
        self.steps: list[Step] = []
        self.iterations = 0
        self.answer: str | None = None
        self.ending: Ending | None = None
        self._desk, self._complete = desk, complete
        self._turns = 2 if form.split_turns else 1
        self._limits = limits or Limits()

    def run(self) -> "Episode":
        """Plays to the end and returns itself."""
        for _ in self:
            pass
        return self

    def __iter__(self) -> Iterator[Step]:
        """The steps, each yielded right after it happened. An episode is played once."""
        try:
            while self.ending is None and self.iterations < self._limits.iterations:
                self.iterations += 1
                yield from self._iterate()
            self.ending = self.ending or Ending.ITERATIONS
        except OutOfContextError:
            self.ending = Ending.CONTEXT

    def _iterate(self) -> Iterator[Step]:
        yield from self._speak(PLAN, self._turns, self._desk.tools)
        tool = tool_named_in(self.steps[-1].text, self._desk.tools)
        if tool is None:
            yield self._tool_says(f"Name a tool: {', '.join(self._desk.tools)}.")
            return
        yield from self._speak(ACTION, 1, ())
        argument = self.steps[-1].text.strip()
        if tool != FINISH or not argument:
            yield self._tool_says(self._desk.call(tool, argument))
            return
        yield from self._speak(REFLECT, self._turns, (RIGHT, WRONG))
        verdict = verdict_in(self.steps[-1].text)
        if verdict == RIGHT:
            self.answer, self.ending = argument, Ending.ACCEPTED
        elif verdict is None:
            yield self._tool_says(f"Say {RIGHT} or {WRONG}.")

    def _speak(self, role: str, turns: int, ends: Sequence[str]) -> Iterator[Step]:
        """At most `turns` turns; one that is nothing but a word of `ends` is the last, whatever was not said before."""
        for _ in range(turns):
            reply = self._complete(role, self.messages, self._limits.max_tokens[role])
            self.messages.append({"role": "assistant", "name": role, "content": reply.text})
            self.steps.append(Step(role, reply.text, reply))
            yield self.steps[-1]
            if reply.text.strip() in ends:
                return

    def _tool_says(self, text: str) -> Step:
        self.messages.append({"role": "tool", "content": text})
        self.steps.append(Step("tool", text))
        return self.steps[-1]


def tool_named_in(text: str, tools: Sequence[str]) -> str | None:
    """Which of `tools` plan chose: its last word, in any case and with punctuation around it; None if it is none."""
    word = _last_word(text)
    return next((tool for tool in tools if tool.lower() == word), None)


def verdict_in(text: str) -> str | None:
    """`right` or `wrong` as reflect's last word, else None."""
    word = _last_word(text)
    return word if word in (RIGHT, WRONG) else None


def _last_word(text: str) -> str:
    words = text.split()
    return words[-1].strip(".,:;!?[]()\"'*").lower() if words else ""
