"""Names, worlds and questions: nothing is guessable, nothing shared, everything repeatable."""

import dataclasses
import random
import re

import pytest

from lragent.errors import UserError
from lragent.eval.world.generate import make_data_set, with_counts
from lragent.eval.world.levels import LEVELS, Level, level_named
from lragent.eval.world.names import FIRST, LATER, take_names
from lragent.eval.world.pages import World, build_world
from lragent.eval.world.questions import OPEN_HOPS, chains, make_questions
from lragent.eval.world.schema import SCHEMA, YEAR


def small(name: str) -> Level:
    """The level with small worlds and few questions, so that tests are quick."""
    level = dataclasses.replace(LEVELS[name], train_entities=60, test_entities=40)
    return with_counts(level, train=40, evaluation=4, test=40)


def words(world: World) -> set[str]:
    return {word for page in world.pages.values() for word in re.findall(r"\w+", f"{page.title} {page.text}")}


def test_names_are_distinct_also_when_two_syllables_run_out() -> None:
    count = len(FIRST) * len(LATER) + 100
    names = take_names(random.Random(0), count)
    assert len({name.lower() for name in names}) == count
    with pytest.raises(ValueError, match="names wanted"):
        take_names(random.Random(0), 10**6)


def test_every_value_is_a_page_of_the_right_kind_and_stated_in_its_sentence() -> None:
    level = small("medium")
    world = build_world(level, random.Random(0), take_names(random.Random(0), 240))
    assert len(world.pages) == 240
    for page in world.pages.values():
        relations = SCHEMA[page.kind][: level.relations]
        assert set(page.facts) == {relation.noun for relation in relations}
        for relation in relations:
            fact = page.facts[relation.noun]
            assert fact.value in page.sentences[fact.sentence]
            assert relation.noun in page.sentences[fact.sentence]
            if relation.target == YEAR:
                assert 1000 <= int(fact.value) <= 1999
            else:
                assert world.pages[fact.value].kind == relation.target
                assert fact.value != page.title


def test_sentences_about_others_are_true() -> None:
    level = small("hard")
    world = build_world(level, random.Random(1), take_names(random.Random(1), 240))
    stated = [
        match.groups()
        for page in world.pages.values()
        for sentence in page.sentences
        if (match := re.fullmatch(r"The (\w+) of (\w+) is (\w+)\.", sentence))
    ]
    assert len(stated) > 500
    assert all(world.pages[other].facts[noun].value == value for noun, other, value in stated)


@pytest.mark.parametrize("name", LEVELS)
def test_worlds_share_no_entity(name: str) -> None:
    data = make_data_set(small(name), seed=3)
    titles = set(data.test.world.pages)
    trained = {
        word
        for trajectory in [*data.train, *data.evaluation]
        for message in trajectory
        for word in re.findall(r"\w+", message["content"])
    }
    assert not titles & trained
    assert len(titles) == 240


def test_evaluation_and_training_share_no_entity() -> None:
    data = make_data_set(small("demo"), seed=3)

    def names(trajectories: list[list[dict[str, str]]]) -> set[str]:
        text = " ".join(message["content"] for trajectory in trajectories for message in trajectory)
        return set(re.findall(r"\b(?:" + "|".join(FIRST) + r")(?:" + "|".join(LATER) + r")+\b", text))

    assert len(names(data.train)) > 50
    assert not names(data.train) & names(data.evaluation)


@pytest.mark.parametrize("name", LEVELS)
def test_questions_keep_the_mix_and_cannot_be_guessed(name: str) -> None:
    level = small(name)
    world = build_world(level, random.Random(5), take_names(random.Random(5), 240))
    questions = make_questions(world, level, random.Random(6), 40, "test")
    assert len({question.text for question in questions}) == 40
    for kind, share in level.mix.items():
        assert sum(question.kind == kind for question in questions) == pytest.approx(40 * share, abs=1)
    for question in questions:
        if question.kind in OPEN_HOPS:
            (path,) = question.paths
            names = world.follow(path.start, path.nouns)
            assert len(names) == OPEN_HOPS[question.kind] + 1
            assert names[-1] == question.answer
            assert question.answer not in question.text
            for earlier in names[:-2]:
                assert not re.search(rf"\b{question.answer}\b", world.pages[earlier].text)
        else:
            left, right = (world.follow(path.start, path.nouns) for path in question.paths)
            if question.kind == "yes_no":
                assert question.answer == ("yes" if left[-1] == right[-1] else "no")
            else:
                assert abs(int(left[-1]) - int(right[-1])) >= level.year_gap
                assert question.answer == (left if int(left[-1]) < int(right[-1]) else right)[-2]
    yes_no = [question.answer for question in questions if question.kind == "yes_no"]
    assert abs(yes_no.count("yes") - yes_no.count("no")) <= 1
    first = [
        question.answer == world.follow(question.paths[0].start, question.paths[0].nouns)[-2]
        for question in questions
        if question.kind == "comparison"
    ]
    assert abs(first.count(True) - first.count(False)) <= 1


def test_chains_never_repeat_a_relation_nor_end_in_a_year() -> None:
    found = list(chains("person", 2, relations=3))
    assert ("birthplace", "mayor") in found
    assert ("teacher", "teacher") not in found
    assert all(chain[-1] != YEAR for chain in found)


def test_a_world_too_small_is_said() -> None:
    level = small("demo")
    world = build_world(level, random.Random(0), take_names(random.Random(0), 18))
    with pytest.raises(UserError, match=r"^count: the world has no \d+ different 'two_hop' questions"):
        make_questions(world, level, random.Random(0), 5000, "test")


def test_the_seed_decides_everything() -> None:
    assert make_data_set(small("medium"), seed=7) == make_data_set(small("medium"), seed=7)
    assert make_data_set(small("medium"), seed=7) != make_data_set(small("medium"), seed=8)


def test_an_unknown_level_is_said() -> None:
    with pytest.raises(UserError, match=r"^level: there is no level 'harder'; choose one of demo, easy"):
        level_named("harder")
