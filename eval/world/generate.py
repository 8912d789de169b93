"""Writes a data set: trajectories to train on, trajectories to watch the loss on, and a test world.

The three come from three worlds that share no entity.
"""

import dataclasses
import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lragent.atomic import new_folder
from lragent.errors import UserError
from lragent.eval.world.gold import gold_trajectories
from lragent.eval.world.levels import Level
from lragent.eval.world.names import take_names
from lragent.eval.world.pages import World, build_world
from lragent.eval.world.questions import Question, make_questions
from lragent.eval.world.schema import SCHEMA
from lragent.eval.world.testset import TestSet, dump_test_set

TRAIN_FILE, EVAL_FILE, TEST_FILE = "train.jsonl", "eval.jsonl", "test_world.json"


@dataclass(frozen=True)
class DataSet:
    """A data set in memory. Trajectories are lists of OpenAI messages."""

    train: list[list[dict[str, Any]]]
    evaluation: list[list[dict[str, Any]]]
    test: TestSet


def make_data_set(level: Level, seed: int) -> DataSet:
    """The data set of `level` and `seed`, the same on every machine. Raises `UserError` when a world is too small."""
    for field in ("train_count", "eval_count", "test_count"):
        if getattr(level, field) < 1:
            raise UserError(f"{field}: is {getattr(level, field)}; at least one is needed.")
    per_kind = (level.train_entities, level.test_entities, level.test_entities)
    sizes = [len(SCHEMA) * count for count in per_kind]
    names = take_names(_rng(seed, "names"), sum(sizes))
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    train_names, eval_names, test_names = (
        names[start : start + size] for start, size in zip(starts, sizes, strict=True)
    )
    train_world, train_questions = _world_with_questions(level, seed, "train", train_names, level.train_count)
    eval_world, eval_questions = _world_with_questions(level, seed, "eval", eval_names, level.eval_count)
    test_world, test_questions = _world_with_questions(level, seed, "test", test_names, level.test_count)
    return DataSet(
        train=gold_trajectories(train_world, train_questions, level, _rng(seed, "train-gold")),
        evaluation=gold_trajectories(eval_world, eval_questions, level, _rng(seed, "eval-gold")),
        test=TestSet(level.name, seed, level.form, level.excerpt, test_world, tuple(test_questions)),
    )


def write_data_set(level: Level, seed: int, folder: Path | str) -> DataSet:
    """Makes the data set and writes its three files into the new `folder`, which appears whole or not at all.

    Raises `UserError` when the folder holds something already or cannot be written.
    """
    with new_folder(folder) as draft:
        data = make_data_set(level, seed)
        (draft / TRAIN_FILE).write_text(_jsonl(data.train), encoding="utf-8")
        (draft / EVAL_FILE).write_text(_jsonl(data.evaluation), encoding="utf-8")
        (draft / TEST_FILE).write_text(dump_test_set(data.test), encoding="utf-8")
    return data


def with_counts(
    level: Level, train: int | None = None, evaluation: int | None = None, test: int | None = None
) -> Level:
    """`level` with other numbers of trajectories and test questions; None keeps the level's own."""
    return dataclasses.replace(
        level,
        train_count=level.train_count if train is None else train,
        eval_count=level.eval_count if evaluation is None else evaluation,
        test_count=level.test_count if test is None else test,
    )


def _world_with_questions(
    level: Level, seed: int, part: str, names: list[str], count: int
) -> tuple[World, list[Question]]:
    world = build_world(level, _rng(seed, f"{part}-world"), names)
    return world, make_questions(world, level, _rng(seed, f"{part}-questions"), count, part)


def _rng(seed: int, purpose: str) -> random.Random:
    """A generator of its own for each purpose, so that more of one thing does not change another."""
    return random.Random(f"lragent:{seed}:{purpose}")


def _jsonl(trajectories: Iterable[list[dict[str, Any]]]) -> str:
    return "".join(json.dumps({"messages": messages}, ensure_ascii=False) + "\n" for messages in trajectories)
