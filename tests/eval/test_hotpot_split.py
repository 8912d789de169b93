"""Rows divided by question: none on both sides, and the folder comes back as it was written."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from autoact_rows import VERDICT, about, row
from hypothesis import given, settings
from hypothesis import strategies as st

from lragent.errors import UserError
from lragent.eval.agent import Episode, Message, Reply
from lragent.eval.hotpot.answers import exact_match, f1
from lragent.eval.hotpot.split import HELD_OUT, TRAIN, read_held_out, split, write_split
from lragent.eval.world.score import normalise
from lragent.trajectories import read_row


def lakes(count: int) -> list[dict[str, Any]]:
    return [about(f"Lake {chr(65 + number)}{number}", str(number)) for number in range(count)]


def asked(trajectory: Any) -> str:
    return normalise(next(message["content"] for message in trajectory if message["role"] == "user"))


@given(
    numbers=st.lists(st.integers(0, 9), min_size=20, max_size=40).filter(lambda some: len(set(some)) > 4),
    seed=st.integers(0, 3),
    shuffled=st.randoms(use_true_random=False),
)
@settings(max_examples=40)
def test_no_question_is_on_both_sides(numbers: list[int], seed: int, shuffled: random.Random) -> None:
    rows = [about(f"Ombel{number}", str(number)) for number in numbers]
    for at, made in enumerate(rows):  # the same question, in another hand
        made["prompt"] = made["prompt"].replace("I need", f"{at % 7} times I need")
        made["question"] = made["question"].upper() if at % 2 else f" {made['question']} "
    made = split(rows, seed)
    out = {normalise(question.text) for question in made.held_out.questions}
    assert {asked(trajectory) for trajectory in made.held_out.trajectories} == out
    assert {asked(learnt["messages"]) for learnt in made.train}.isdisjoint(out)
    assert len(made.train) + len(made.held_out.trajectories) == len(rows) == made.counts.kept
    assert len(out) == round(0.2 * len(set(numbers)))
    again = split(shuffled.sample(rows, len(rows)), seed)
    one, other = ([row["messages"][2:] for row in which.train] for which in (made, again))
    assert one == other
    assert again.held_out.passages == made.held_out.passages
    assert again.held_out.questions == made.held_out.questions


def test_seeds_hold_out_different_questions_in_one_world() -> None:
    one, other = split(lakes(40), 0).held_out, split(lakes(40), 1).held_out
    assert one.questions != other.questions
    assert one.passages == other.passages
    assert len(one.passages) == 40


def test_a_question_without_a_trajectory_is_asked_all_the_same() -> None:
    rows = [*lakes(19), *({**made, "halted": True} for made in (about("Halt", "7"),))]
    found = [split(rows, seed) for seed in range(40)]
    held = [made for made in found if any("Halt" in question.text for question in made.held_out.questions)]
    assert held
    assert all(len(made.held_out.trajectories) == 3 for made in held)


def test_every_wording_of_an_answer_is_right() -> None:
    rows = [*lakes(2), about("Ombel", "40"), {**about("Ombel", "40"), "answer": "The 40."}]
    found = [question for seed in range(20) for question in split([*rows, *lakes(6)[2:]], seed).held_out.questions]
    ombel = next(question for question in found if "Ombel" in question.text)
    assert ombel.answers == ("40", "The 40.")
    assert len({question.id for question in found if "Ombel" in question.text}) == 1, "seeds agree on its id"


def test_what_is_written_is_read_again_and_can_be_learnt_from(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([*lakes(12), {"question": "?"}, 7]))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(made) + "\n" for made in lakes(6)))
    made = write_split([tmp_path / "a.json", tmp_path / "b.jsonl"], 3, tmp_path / "out")
    assert made.counts.rows == 20
    assert made.counts.dropped.total() == 2
    assert read_held_out(tmp_path / "out") == made.held_out
    for name in (TRAIN, HELD_OUT):
        text = (tmp_path / "out" / name).read_text()
        assert VERDICT not in text
        for line in text.splitlines():
            read_row(json.loads(line), ("plan", "action", "reflect"), source=name)
    with pytest.raises(UserError, match="is there already"):
        write_split([tmp_path / "a.json"], 3, tmp_path / "out")


def test_what_is_not_there_or_too_small_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no held_out\.jsonl; make the folder by `lragent eval text split`"):
        read_held_out(tmp_path)
    with pytest.raises(UserError, match="2 questions are too few"):
        split(lakes(2), 0)
    write_split([_file(tmp_path, lakes(6))], 0, tmp_path / "out")
    (tmp_path / "out" / "questions.jsonl").write_text('{"id": "x"}\n')
    with pytest.raises(UserError, match="a row lacks a field"):
        read_held_out(tmp_path / "out")


def _file(folder: Path, rows: list[dict[str, Any]]) -> Path:
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder / "rows.json"


def test_the_loop_says_what_the_recorded_trajectory_says() -> None:
    """Form, tools and their words are those that the roles learn: a team that repeats a trajectory plays it again."""
    held_out = split(lakes(10), 0).held_out
    for trajectory in held_out.trajectories:
        said = iter([message for message in trajectory if message["role"] == "assistant"])

        def repeat(role: str, messages: list[Message], max_tokens: int, said: Any = said) -> Reply:
            message = next(said)
            assert message["name"] == role
            return Reply(message["content"])

        episode = Episode(trajectory[1]["content"], held_out.desks()(), repeat, held_out.form).run()
        assert episode.messages == list(trajectory)
        question = next(q for q in held_out.questions if q.text == trajectory[1]["content"])
        assert exact_match(episode.answer, question.answers)


def test_a_trajectory_of_a_bare_verdict_is_played_again_too() -> None:
    steps = [("", "Finish[x]", "Please reflect your answer."), ("", "Reflect[right]", VERDICT)]
    made = [row(f"{number} what?", "x", steps) for number in range(5)]
    trajectory = split(made, 0).held_out.trajectories[0]
    assert [message["content"] for message in trajectory[2:]] == ["Finish", "x", "right"]


@pytest.mark.parametrize(
    ("answer", "gold", "exact", "score"),
    [
        ("The Apple II.", ("apple ii",), True, 1.0),
        ("Apple", ("x", "the apple ii"), False, 2 / 3),
        ("pear apple pear", ("apple apple pear",), False, 2 / 3),
        ("yes", ("yes it is",), False, 0.0),
        ("yes", ("Yes.",), True, 1.0),
        ("no", ("no", "never"), True, 1.0),
        ("", ("x",), False, 0.0),
        (None, ("x",), False, 0.0),
    ],
)
def test_answers_are_scored_as_hotpotqa_does(
    answer: str | None, gold: tuple[str, ...], exact: bool, score: float
) -> None:
    assert exact_match(answer, gold) is exact
    assert f1(answer, gold) == pytest.approx(score)
