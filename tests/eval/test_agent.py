"""The agent loop, driven by scripts and by the oracle."""

import dataclasses
import random

import pytest

from lragent.errors import LRAgentError
from lragent.eval.agent import (
    Complete,
    Ending,
    Episode,
    Limits,
    Message,
    OutOfContextError,
    Reply,
    tool_named_in,
    verdict_in,
)
from lragent.eval.world.form import Form
from lragent.eval.world.generate import make_data_set, with_counts
from lragent.eval.world.gold import gold_trajectory
from lragent.eval.world.levels import LEVELS
from lragent.eval.world.oracle import Oracle
from lragent.eval.world.pages import Fact, Page, World
from lragent.eval.world.questions import Path, Question
from lragent.eval.world.score import score
from lragent.eval.world.tools import Desk, Library

WORLD = World(
    {
        "Zenvor": Page(
            "Zenvor",
            "company",
            ("A company.", "The founder is Milbek.", "The seat is Lexzan."),
            {"founder": Fact("Milbek", 1), "seat": Fact("Lexzan", 2)},
        ),
        "Milbek": Page(
            "Milbek", "person", ("A person.", "The birthplace is Lexzan."), {"birthplace": Fact("Lexzan", 1)}
        ),
        "Rompox": Page("Rompox", "company", ("A company.", "The seat is Tamwen."), {"seat": Fact("Tamwen", 1)}),
        "Lexzan": Page("Lexzan", "city", ("A city.",), {}),
    }
)
OPEN = Question(
    "q",
    "two_hop",
    "What is the birthplace of the founder of Zenvor?",
    "Lexzan",
    (Path("Zenvor", ("founder", "birthplace")),),
)
PAIR = Question(
    "p",
    "yes_no",
    "Do Zenvor and Rompox have the same seat?",
    "no",
    (Path("Zenvor", ("seat",)), Path("Rompox", ("seat",))),
)
FORM = Form("Use tools.")


def scripted(turns: list[tuple[str, str]]) -> Complete:
    """Answers with `turns` one after another and checks whose turn it is."""
    left = iter(turns)

    def complete(role: str, messages: list[Message], max_tokens: int) -> Reply:
        expected, text = next(left)
        assert role == expected
        return Reply(text, tokens_computed=10, tokens_reused=5, ttft_s=0.5)

    return complete


def desk(excerpt: int = 100) -> Desk:
    return Desk(Library(WORLD, excerpt))


def spoken(messages: list[dict[str, str]]) -> list[tuple[str, str]]:
    return [(message.get("name", message["role"]), message["content"]) for message in messages]


def test_the_oracle_writes_this_trajectory() -> None:
    messages = gold_trajectory(WORLD, Library(WORLD, 100), OPEN, LEVELS["demo"], True, random.Random(0))
    assert spoken(messages) == [
        ("system", "Tools: Search, Lookup, Finish."),
        ("user", "What is the birthplace of the founder of Zenvor?"),
        ("plan", "Need the founder of Zenvor. Search"),
        ("action", "Zenvor"),
        ("tool", "Zenvor: A company. The founder is Milbek. The seat is Lexzan."),
        ("plan", "The founder is Milbek. Finish"),
        ("action", "Milbek"),
        ("reflect", "Asked birthplace, got founder. wrong"),
        ("plan", "Need the birthplace of Milbek. Search"),
        ("action", "Milbek"),
        ("tool", "Milbek: A person. The birthplace is Lexzan."),
        ("plan", "The birthplace is Lexzan. Finish"),
        ("action", "Lexzan"),
        ("reflect", "Asked birthplace, got birthplace. right"),
    ]
    assert [i for i, message in enumerate(messages) if message.get("weight") == 0] == [5, 6]


def test_the_oracle_looks_further_down_a_page_and_splits_turns() -> None:
    oracle = Oracle(WORLD, PAIR, Form("", split_turns=True), wrong_first=True)
    episode = Episode(PAIR.text, desk(excerpt=2), oracle, Form("", split_turns=True)).run()
    assert spoken(episode.messages) == [
        ("user", "Do Zenvor and Rompox have the same seat?"),
        ("plan", "Need the seat of Zenvor."),
        ("plan", "Search"),
        ("action", "Zenvor"),
        ("tool", "Zenvor: A company. The founder is Milbek. ..."),
        ("plan", "No seat of Zenvor."),
        ("plan", "Lookup"),
        ("action", "seat"),
        ("tool", "The seat is Lexzan."),
        ("plan", "The seat is Lexzan. Need the seat of Rompox."),
        ("plan", "Search"),
        ("action", "Rompox"),
        ("tool", "Rompox: A company. The seat is Tamwen."),
        ("plan", "The seat is Tamwen. Lexzan, Tamwen: yes."),
        ("plan", "Finish"),
        ("action", "yes"),
        ("reflect", "Lexzan, Tamwen: no, got yes."),
        ("reflect", "wrong"),
        ("plan", "Lexzan, Tamwen: no."),
        ("plan", "Finish"),
        ("action", "no"),
        ("reflect", "Lexzan, Tamwen: no, got no."),
        ("reflect", "right"),
    ]
    assert episode.answer == "no"
    assert episode.iterations == 5


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("wrong_first", [False, True])
def test_the_oracle_answers_every_question(name: str, wrong_first: bool) -> None:
    level = with_counts(dataclasses.replace(LEVELS[name], train_entities=40, test_entities=40), 1, 1, 60)
    test = make_data_set(level, seed=1).test
    library = test.library()
    episodes = [
        Episode(q.text, Desk(library), Oracle(test.world, q, test.form, wrong_first, random.Random(0)), test.form).run()
        for q in test.questions
    ]
    result = score(test.questions, episodes)
    assert result.overall.correct == result.overall.total == 60
    assert result.out_of_function == 0
    for episode in episodes:
        verdicts = [verdict_in(step.text) for step in episode.steps if step.role == "reflect"]
        assert verdicts.count("wrong") == int(wrong_first)


def test_wrong_first_answers_come_in_the_levels_proportion() -> None:
    level = with_counts(dataclasses.replace(LEVELS["demo"], wrong_first=0.25), 40, 1, 1)
    data = make_data_set(level, seed=0)
    assert sum(any(m.get("weight") == 0 for m in trajectory) for trajectory in data.train) == 8


def test_steps_are_seen_as_they_happen() -> None:
    said: list[str] = []

    def complete(role: str, messages: list[Message], max_tokens: int) -> Reply:
        said.append(role)
        return Reply({"plan": "Search", "action": "Zenvor", "reflect": "right"}[role])

    steps = iter(Episode("?", desk(), complete, FORM))
    assert next(steps).role == "plan"
    assert said == ["plan"]
    assert next(steps).text == "Zenvor"
    assert next(steps).role == "tool"
    assert said == ["plan", "action"]


def test_what_cannot_be_parsed_is_said_by_the_tool() -> None:
    turns = [
        ("plan", "I do not know"),
        ("plan", "Search"),
        ("action", " "),
        ("plan", "Finish"),
        ("action", ""),
        ("plan", "Finish"),
        ("action", "Lexzan"),
        ("reflect", "Hm"),
        ("plan", "Finish"),
        ("action", " Lexzan "),
        ("reflect", "right"),
    ]
    episode = Episode("?", desk(), scripted(turns), FORM).run()
    assert [step.text for step in episode.steps if step.role == "tool"] == [
        "Name a tool: Search, Lookup, Finish.",
        "Search needs an argument.",
        "Finish needs an argument.",
        "Say right or wrong.",
    ]
    assert (episode.answer, episode.ending, episode.iterations) == ("Lexzan", Ending.ACCEPTED, 5)
    assert episode.messages[2] == {"role": "assistant", "name": "plan", "content": "I do not know"}


def test_no_answer_within_the_limits_is_out_of_function() -> None:
    turns = [("plan", "Finish"), ("action", "Lexzan"), ("reflect", "wrong")] * 3
    episode = Episode("?", desk(), scripted(turns), FORM, Limits(iterations=3)).run()
    assert (episode.answer, episode.ending, episode.iterations) == (None, Ending.ITERATIONS, 3)
    result = score([OPEN], [episode])
    assert (result.overall.correct, result.out_of_function) == (0, 1)
    assert (result.tokens_computed, result.tokens_reused, result.ttft_s) == (90, 45, 4.5)


def test_a_full_context_ends_the_trajectory() -> None:
    def complete(role: str, messages: list[Message], max_tokens: int) -> Reply:
        if len(messages) > 3:
            raise OutOfContextError("too long")
        return Reply("Search")

    episode = Episode("?", desk(), complete, FORM).run()
    assert (episode.answer, episode.ending) == (None, Ending.CONTEXT)


def test_roles_get_their_own_token_limits() -> None:
    seen: dict[str, int] = {}

    def complete(role: str, messages: list[Message], max_tokens: int) -> Reply:
        seen[role] = max_tokens
        return Reply({"plan": "Finish", "action": "x", "reflect": "right"}[role])

    Episode("?", desk(), complete, FORM, Limits(max_tokens={"plan": 1, "action": 2, "reflect": 3})).run()
    assert seen == {"plan": 1, "action": 2, "reflect": 3}


def test_the_oracle_notices_a_turn_out_of_order() -> None:
    with pytest.raises(LRAgentError, match="turn of plan ready, the loop asks action"):
        Oracle(WORLD, OPEN, FORM)("action", [{"role": "user", "content": "?"}], 8)


@pytest.mark.parametrize(
    ("text", "tool"),
    [("Need x. Search", "Search"), ("lookup.", "Lookup"), ("[Finish]", "Finish"), ("Search for x", None), ("", None)],
)
def test_the_tool_is_the_last_word(text: str, tool: str | None) -> None:
    assert tool_named_in(text, ("Search", "Lookup", "Finish")) == tool


@pytest.mark.parametrize(
    ("text", "verdict"), [("So: Right.", "right"), ("wrong", "wrong"), ("right?! no", None), (" ", None)]
)
def test_the_verdict_is_the_last_word(text: str, verdict: str | None) -> None:
    assert verdict_in(text) == verdict


def test_a_turn_that_is_only_the_word_asked_for_needs_no_other() -> None:
    split = dataclasses.replace(FORM, split_turns=True)
    turns = [("plan", "Finish"), ("action", "Lexzan"), ("reflect", "right")]
    episode = Episode("?", desk(), scripted(turns), split).run()
    assert [step.text for step in episode.steps] == ["Finish", "Lexzan", "right"]
    assert episode.answer == "Lexzan"


def test_the_tools_are_those_of_the_desk() -> None:
    class Phone:
        tools = ("Call", "Finish")

        def call(self, tool: str, argument: str) -> str:
            return f"{tool} {argument}: engaged."

    turns = [("plan", "Search"), ("plan", "Call"), ("action", "mum")]
    steps = Episode("?", Phone(), scripted(turns), FORM, Limits(iterations=2)).run().steps
    assert [step.text for step in steps if step.role == "tool"] == ["Name a tool: Call, Finish.", "Call mum: engaged."]
