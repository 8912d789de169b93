"""The file of answers: gone on with after any end, never two answers to one question, never two writers."""

from __future__ import annotations

import dataclasses
import json
import resource
import signal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lragent.errors import UserError
from lragent.eval.agent import Ending, Episode, Limits, Message, Reply
from lragent.eval.answers import Answer, AnswerFile, read_answers, settled
from lragent.eval.world.generate import make_data_set, with_counts
from lragent.eval.world.levels import LEVELS
from lragent.eval.world.oracle import Oracle


def answer(number: int, **changes: object) -> Answer:
    plain = Answer(
        id=f"test-{number}", kind="two_hop", answer="Zürich\n2", right=True, ending=Ending.ACCEPTED, iterations=3,
        turns=7, context=240, generated=31, computed=60, reused=700, seconds=0.25, ttft_s=0.1,
    )  # fmt: skip
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]  # of several types


@given(st.sets(st.integers(0, 12)))
def test_answers_count_up_to_the_first_open_question(numbers: set[int]) -> None:
    answers = {f"test-{number}": answer(number) for number in sorted(numbers, key=lambda number: number % 5)}
    told: list[str] = []
    counted = settled(answers, "x", told.append)
    whole = len(counted)
    assert [each.id for each in counted] == [f"test-{number}" for number in range(whole)]
    assert whole not in numbers
    assert whole + sum(int(sentence.removeprefix("x: ").split()[0]) for sentence in told) == len(numbers)


def test_what_was_written_is_read_again(tmp_path: Path) -> None:
    kept = [answer(0), answer(1, answer=None, right=False, ending=Ending.CONTEXT)]
    with AnswerFile(tmp_path / "new" / "a.jsonl") as file:
        for each in kept:
            file.add(each)
            assert read_answers(file.path)[each.id] == each, "it is there at once"
    with AnswerFile(file.path) as again:
        assert list(again.answers.values()) == kept
        again.add(answer(2))
    assert list(read_answers(file.path)) == ["test-0", "test-1", "test-2"]


def test_a_line_that_was_cut_off_anywhere_is_asked_again(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with AnswerFile(path) as file:
        file.add(answer(0))
        file.add(answer(1))
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for end in range(first, len(whole)):
        path.write_bytes(whole[:end])
        assert list(read_answers(path)) == ["test-0"]
        with AnswerFile(path) as file:
            assert list(file.answers) == ["test-0"]
            file.add(answer(1))
        assert path.read_bytes() == whole


def test_two_answers_to_one_question_are_refused_by_whoever_reads(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [json.dumps(dataclasses.asdict(each)) + "\n" for each in (answer(0), answer(0), answer(0, seconds=0.3))]
    path.write_text("".join(lines[:2]))
    assert read_answers(path) == {"test-0": answer(0)}, "the same twice says nothing else"
    path.write_text("".join(lines))
    with pytest.raises(UserError, match=r"a\.jsonl:3: question 'test-0' has two different answers"):
        read_answers(path)
    with pytest.raises(UserError, match=r"a\.jsonl:3: question 'test-0' has two different answers"):
        AnswerFile(path)
    assert path.read_text() == "".join(lines), "nothing is taken away"


@pytest.mark.parametrize("line", ["", "nonsense", "[]", "3", '{"id": "test-0"}', '{"ending": "accepted", "more": 1}'])
def test_a_line_that_is_no_answer_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(dataclasses.asdict(answer(0))) + f"\n{line}\n")
    for reads in (read_answers, AnswerFile):
        with pytest.raises(UserError, match=r"a\.jsonl:2: is no answer"):
            reads(path)


def test_one_process_has_the_file(tmp_path: Path) -> None:
    with AnswerFile(tmp_path / "a.jsonl") as file:
        file.add(answer(0))
        with pytest.raises(UserError, match="another process writes to it"):
            AnswerFile(file.path)
        file.add(answer(1))
    with AnswerFile(file.path) as again:
        assert len(again.answers) == 2


def test_what_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_answers(tmp_path / "none.jsonl")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written to"):
        AnswerFile(tmp_path / "file" / "a.jsonl")


def test_half_an_answer_on_a_full_disk_is_taken_back(tmp_path: Path) -> None:
    with AnswerFile(tmp_path / "a.jsonl") as file:
        file.add(answer(0))
        most = file.path.stat().st_size + 40
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
        try:
            with pytest.raises(UserError, match="cannot be written to"):
                file.add(answer(1))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, handler)
        file.add(answer(2))
        assert list(file.answers) == ["test-0", "test-2"]
    assert read_answers(file.path) == file.answers


def test_an_episode_in_numbers() -> None:
    test = make_data_set(with_counts(LEVELS["demo"], 1, 1, 1), seed=0).test
    question = test.questions[0]
    oracle = Oracle(test.world, question, test.form)
    replies: list[Reply] = []

    def complete(role: str, messages: list[Message], max_tokens: int) -> Reply:
        at = len(replies)
        replies.append(Reply(oracle(role, messages, max_tokens).text, 10 + at, 3, 2, 8 + at, ttft_s=0.5, total_s=0.75))
        return replies[-1]

    episode = Episode(question.text, test.desks()(), complete, test.form, Limits()).run()
    found, turns = Answer.of(question, episode), len(replies)
    assert (found.id, found.kind, found.answer, found.right) == (question.id, question.kind, question.answer, True)
    assert (found.turns, found.context, found.generated) == (turns, 10 + turns - 1 + 3, 3 * turns)
    assert (found.computed, found.reused) == (2 * turns, sum(8 + at for at in range(turns)))
    assert (found.seconds, found.ttft_s) == (0.75 * turns, 0.5 * turns)
    silent = Episode(question.text, test.desks()(), lambda *_: Reply("hm"), test.form, Limits(iterations=2)).run()
    none = Answer.of(question, silent)
    assert (none.answer, none.right, none.ending, none.context, none.seconds) == (None, False, "iterations", 0, 0)
