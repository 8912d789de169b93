"""One trajectory after another, printed step by step: our server's, and the same steps by transformers + PEFT."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from lragent.bench.baselines import CachePerRole, FirstToken, PeftTeam, PrefillAnew, Turn
from lragent.chat import Renderer
from lragent.eval.agent import Complete, Episode, Limits, Message, Reply, Step
from lragent.eval.world.questions import Question
from lragent.eval.world.score import is_right
from lragent.eval.world.testset import TestSet
from lragent.eval.world.tools import Desk

STYLES = {"plan": "cyan", "action": "yellow", "reflect": "magenta", "tool": "dim"}


@dataclass
class Sums:
    """Over all steps shown. Seconds are to the first token."""

    retokenised: int = 0
    """Steps whose prompt our server knew by the ids that were generated, which differ from those of the text."""

    steps: int = 0
    computed: int = 0
    reused: int = 0
    ttft_s: float = 0.0
    anew_computed: int = 0
    anew_s: float = 0.0
    per_role_computed: int = 0
    per_role_s: float = 0.0
    generated: int = 0
    """Turns that PEFT's `generate` was asked for as well."""
    generated_same: int = 0
    """Of these, the turns to which it gave the same text."""
    generated_s: float = 0.0
    ours_s: float = 0.0
    """Our whole time for the turns that PEFT generated too."""


@dataclass
class SideBySide:
    """Plays trajectories on our server and replays each step's context by the baselines, right after the step.

    The baselines run the same token ids as our server, for one token: their time to it is what is compared. Where
    `generate` is asked for, PEFT also generates the turn, so that its text can be seen.
    """

    test: TestSet
    complete: Complete
    limits: Limits
    renderer: Renderer
    tokenizer: PreTrainedTokenizerBase
    team: PeftTeam
    console: Console
    sums: Sums = field(default_factory=Sums)

    def play(self, question: Question, *, generate: bool) -> Episode:
        """Play one question to its end, printing as it goes; returns the trajectory."""
        anew, per_role = PrefillAnew(self.team), CachePerRole(self.team)
        per_role.begin()
        self.console.print(Text(f"\n{question.text}", style="bold"))
        self._print_head()
        episode = Episode(question.text, Desk(self.test.library()), self.complete, self.test.form, self.limits)
        for step in episode:
            if step.reply is None:
                self._print_row(step.role, step.text)
                continue
            turn = turn_of(self.renderer, episode.messages, step.reply)
            firsts = anew.first_token(turn), per_role.first_token(turn)
            per_role.absorb(turn)
            self.sums.retokenised += step.reply.prompt_tokens != len(turn.prompt_ids)
            self._count(step.reply, *firsts)
            self._print_step(step, step.reply, *firsts)
            if generate:
                self._generate(anew, turn, step)
        right = is_right(question, episode.answer)
        verdict = Text("right" if right else f"wrong: it is {question.answer}", style="green" if right else "red")
        self.console.print(Text(f"answer: {episode.answer or 'none'} (").append(verdict).append(")"))
        return episode

    def _count(self, reply: Reply, anew: FirstToken, per_role: FirstToken) -> None:
        sums = self.sums
        sums.steps += 1
        sums.computed += reply.tokens_computed or 0
        sums.reused += reply.tokens_reused or 0
        sums.ttft_s += reply.ttft_s or 0.0
        sums.anew_computed += anew.computed
        sums.anew_s += anew.seconds
        sums.per_role_computed += per_role.computed
        sums.per_role_s += per_role.seconds

    def _generate(self, anew: PrefillAnew, turn: Turn, step: Step) -> None:
        ends = [self.renderer.end_of_turn]
        made = anew.generate(turn, self.limits.max_tokens[step.role], ends)
        text = self.tokenizer.decode([token for token in made.token_ids if token not in ends])
        same = text == step.text
        self.sums.generated += 1
        self.sums.generated_same += same
        self.sums.generated_s += made.total_s
        self.sums.ours_s += step.reply.total_s or 0.0 if step.reply else 0.0
        if not same:
            self._print_row("", f"(PEFT's own text here: {text})")

    def _print_head(self) -> None:
        heads = ("computed", "reused", "TTFT", "computed", "TTFT", "computed", "TTFT")
        self._print(Text(""), Text(""), ("LRAgent", "PEFT cache per role", "PEFT anew"), "bold", widths=(29, 19, 19))
        self._print(Text("step", style="bold"), Text("text", style="bold"), heads, "bold")

    def _print_step(self, step: Step, reply: Reply, anew: FirstToken, per_role: FirstToken) -> None:
        cells = (
            str(reply.tokens_computed),
            str(reply.tokens_reused),
            _ms(reply.ttft_s or 0.0),
            str(per_role.computed),
            _ms(per_role.seconds),
            str(anew.computed),
            _ms(anew.seconds),
        )
        self._print_row(step.role, step.text, cells)

    def _print_row(self, role: str, text: str, cells: Sequence[str] = ("",) * 7) -> None:
        style = STYLES.get(role, "dim")
        shown = Text(" ".join(text.split()), style="dim" if role not in STYLES or role == "tool" else "")
        self._print(Text(role, style=style), shown, cells, "")

    def _print(
        self, role: Text, text: Text, cells: Sequence[str], style: str, widths: Sequence[int] = (9,) * 7
    ) -> None:
        """One row of a table that grows while it is watched: every row is a grid of the same widths."""
        grid = Table.grid(padding=(0, 1), expand=True)
        grid.add_column(width=7)
        grid.add_column(ratio=1, overflow="fold")
        for width in widths:
            grid.add_column(width=width, justify="right", no_wrap=True)
        grid.add_row(role, text, *(Text(cell, style=style) for cell in cells))
        self.console.print(grid)


def turn_of(renderer: Renderer, messages: Sequence[Message], reply: Reply) -> Turn:
    """The last of `messages` as tokens: the context that was asked, and what was generated."""
    prompt = renderer.render(messages[:-1], ask=True).token_ids
    whole = renderer.render(messages).token_ids
    end = len(prompt) + (reply.generated_tokens or 0)
    return Turn(messages[-1]["name"], tuple(prompt), tuple(whole[len(prompt) : end]))


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms"
