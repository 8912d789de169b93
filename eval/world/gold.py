"""Gold trajectories: the oracle's own runs through the agent loop."""

import random
from typing import Any

from lragent.errors import LRAgentError
from lragent.eval.agent import Episode
from lragent.eval.world.levels import Level
from lragent.eval.world.oracle import Oracle
from lragent.eval.world.pages import World
from lragent.eval.world.questions import OPEN_HOPS, Question
from lragent.eval.world.tools import Desk, Library


def gold_trajectory(
    world: World, library: Library, question: Question, level: Level, wrong_first: bool, rng: random.Random
) -> list[dict[str, Any]]:
    """The messages of a run that ends with the right answer.

    The turns of a deliberate mistake carry OpenAI's `weight: 0`: they are context, not something to learn.
    """
    oracle = Oracle(world, question, level.form, wrong_first, rng)
    episode = Episode(question.text, Desk(library), oracle, level.form).run()
    if episode.answer != question.answer:
        raise LRAgentError(f"The oracle cannot answer '{question.text}' with the tools (ended by {episode.ending}).")
    messages: list[dict[str, Any]] = [dict(message) for message in episode.messages]
    turns = [message for message in messages if message["role"] == "assistant"]
    for turn, mistaken in zip(turns, oracle.mistaken, strict=True):
        if mistaken:
            turn["weight"] = 0
    return messages


def gold_trajectories(
    world: World, questions: list[Question], level: Level, rng: random.Random
) -> list[list[dict[str, Any]]]:
    """One gold trajectory per question, wrong first answers in the level's proportion (exactly, rounded down)."""
    library = Library(world, level.excerpt)
    is_open = [question.kind in OPEN_HOPS for question in questions]
    wrong: set[int] = set()
    for kind_is_open, share in ((True, level.wrong_first), (False, level.wrong_first_pairs)):
        places = [i for i, this_is_open in enumerate(is_open) if this_is_open == kind_is_open]
        wrong.update(rng.sample(places, int(share * len(places))))
    return [gold_trajectory(world, library, q, level, i in wrong, rng) for i, q in enumerate(questions)]
