"""HotpotQA's two scores of an answer, each the best over the wordings that are right."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from lragent.eval.world.score import normalise

_WHOLE = ("yes", "no", "noanswer")
"""Answers that are right or wrong, and nothing between."""


def exact_match(answer: str | None, gold: Sequence[str]) -> bool:
    """Whether `answer` is one of `gold` in normal form; None, no answer, never is."""
    return answer is not None and normalise(answer) in {normalise(text) for text in gold}


def f1(answer: str | None, gold: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of the words in normal form, 0 to 1; 0 where there is no answer."""
    return 0.0 if answer is None else max(_f1(normalise(answer), normalise(text)) for text in gold)


def _f1(answer: str, gold: str) -> float:
    if answer != gold and (answer in _WHOLE or gold in _WHOLE):
        return 0.0
    said, right = answer.split(), gold.split()
    same = (Counter(said) & Counter(right)).total()
    return 2 * same / (len(said) + len(right)) if same else 0.0
