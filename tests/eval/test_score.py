"""Scoring by hand-worked cases."""

import dataclasses

import pytest

from lragent.eval.world.generate import make_data_set, with_counts
from lragent.eval.world.levels import LEVELS
from lragent.eval.world.questions import Path, Question
from lragent.eval.world.score import Tally, is_right, never_search, normalise


def question(kind: str, answer: str, *starts: str) -> Question:
    return Question("q", kind, "?", answer, tuple(Path(start, ("year",)) for start in starts))


@pytest.mark.parametrize(
    ("answer", "normal"), [("The Zenvor.", "zenvor"), ("  yes ", "yes"), ("A  b, c", "b c"), ("Anvil", "anvil")]
)
def test_normal_form(answer: str, normal: str) -> None:
    assert normalise(answer) == normal


def test_only_the_gold_answer_is_right() -> None:
    assert is_right(question("two_hop", "Zenvor", "x"), "zenvor.")
    assert not is_right(question("two_hop", "Zenvor", "x"), "Zenvor Milbek")
    assert not is_right(question("two_hop", "Zenvor", "x"), None)


def test_never_searching_is_scored_by_its_best_guess() -> None:
    questions = [
        *(question("yes_no", answer, "a", "b") for answer in ("yes", "yes", "no")),
        *(question("comparison", answer, "left", "right") for answer in ("right", "right", "left")),
        *(question("two_hop", answer, "a") for answer in ("u", "v", "w", "w")),
    ]
    score = never_search(questions)
    assert score.by_kind == {"comparison": Tally(2, 3), "two_hop": Tally(2, 4), "yes_no": Tally(2, 3)}
    assert score.overall == Tally(6, 10)


@pytest.mark.parametrize("name", LEVELS)
def test_never_searching_gets_little(name: str) -> None:
    level = dataclasses.replace(with_counts(LEVELS[name], 1, 1, 200), train_entities=20)
    score = never_search(make_data_set(level, seed=0).test.questions)
    assert score.overall.share < 0.26
    for kind, tally in score.by_kind.items():
        assert tally.share <= (0.5 if kind in ("yes_no", "comparison") else 0.05)
