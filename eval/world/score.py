"""Scores: normalised exact match by kind of question, what it cost, and what a policy without tools would get."""

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from lragent.eval.agent import Ending, Episode
from lragent.eval.world.questions import Question


def normalise(answer: str) -> str:
    """HotpotQA's normal form: lower case, without punctuation, articles and surplus space."""
    bare = "".join(character for character in answer.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def is_right(question: Question, answer: str | None) -> bool:
    """Whether `answer` is the gold answer in normal form; None (out of function) never is."""
    return answer is not None and normalise(answer) == normalise(question.answer)


@dataclass(frozen=True)
class Tally:
    """Right answers out of questions asked."""

    correct: int
    total: int

    @property
    def share(self) -> float:
        return self.correct / self.total if self.total else 0.0


@dataclass(frozen=True)
class Score:
    """Counts over a set of questions. Token sums and times leave out turns whose backend did not tell."""

    overall: Tally
    by_kind: dict[str, Tally]
    out_of_function: int = 0
    """Trajectories that ended without an accepted answer."""
    iterations: int = 0
    tokens_computed: int = 0
    tokens_reused: int = 0
    ttft_s: float = 0.0


def score(questions: Sequence[Question], episodes: Sequence[Episode]) -> Score:
    """The score of ended `episodes`, one per question in the same order."""
    right = [is_right(q, episode.answer) for q, episode in zip(questions, episodes, strict=True)]
    replies = [step.reply for episode in episodes for step in episode.steps if step.reply is not None]
    return Score(
        overall=Tally(sum(right), len(right)),
        by_kind=_by_kind(questions, right),
        out_of_function=sum(episode.ending != Ending.ACCEPTED for episode in episodes),
        iterations=sum(episode.iterations for episode in episodes),
        tokens_computed=sum(reply.tokens_computed or 0 for reply in replies),
        tokens_reused=sum(reply.tokens_reused or 0 for reply in replies),
        ttft_s=sum(reply.ttft_s or 0.0 for reply in replies),
    )


def never_search(questions: Sequence[Question]) -> Score:
    """The best that a policy without tools can get, chosen per kind in hindsight (so an upper bound for such policies).

    It gives one constant answer to all questions of a kind, or always the thing that the question names first, or last.
    """
    right = [False] * len(questions)
    for kind in {question.kind for question in questions}:
        places = [i for i, question in enumerate(questions) if question.kind == kind]
        constant, _ = Counter(normalise(questions[i].answer) for i in places).most_common(1)[0]
        guesses = [
            [normalise(questions[i].answer) == constant for i in places],
            [is_right(questions[i], questions[i].paths[0].start) for i in places],
            [is_right(questions[i], questions[i].paths[-1].start) for i in places],
        ]
        for i, hit in zip(places, max(guesses, key=sum), strict=True):
            right[i] = hit
    return Score(Tally(sum(right), len(right)), _by_kind(questions, right))


def _by_kind(questions: Sequence[Question], right: Sequence[bool]) -> dict[str, Tally]:
    kinds = sorted({question.kind for question in questions})
    hits = Counter(question.kind for question, hit in zip(questions, right, strict=True) if hit)
    totals = Counter(question.kind for question in questions)
    return {kind: Tally(hits[kind], totals[kind]) for kind in kinds}
