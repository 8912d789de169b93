"""Runs of elements against lists."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lragent.serve.cache.elements import FEW, Elements, kinds_of

TAGS = st.lists(st.integers(0, 4) | st.integers(0, 1000), max_size=200)


def elements(tags: list[int], first: int = 0) -> Elements:
    column = np.array(tags, np.int64)
    return Elements(first + np.arange(len(tags)), column, 1000 + first + np.arange(len(tags)), kinds_of(column))


def check(run: Elements, tags: list[int]) -> None:
    assert run.tokens.tolist() == list(range(len(tags)))
    assert run.tags.tolist() == tags
    assert run.slots.tolist() == list(range(1000, 1000 + len(tags)))
    assert run.kinds is None or set(tags) <= run.kinds
    assert run.kinds is None or len(run.kinds) <= FEW


@given(st.lists(TAGS, min_size=1, max_size=6))
def test_prolonged_again_and_again(parts: list[list[int]]) -> None:
    run, tags = elements(parts[0]), list(parts[0])
    views = []
    for part in parts[1:]:
        views.append((run.slots, run.slots.tolist()))
        run.prolong(elements(part, len(tags)))
        tags += part
        check(run, tags)
    for view, numbers in views:
        assert view.tolist() == numbers, "what was read before has changed"


def test_a_part_is_a_copy() -> None:
    run = elements([1, 1, 2, 2])
    part = run.part(0, 2)
    part.prolong(elements([3, 3], 2))
    check(run, [1, 1, 2, 2])
    check(part, [1, 1, 3, 3])


@pytest.mark.parametrize("length", [1, FEW, FEW + 1, 5000])
def test_kinds(length: int) -> None:
    assert kinds_of(np.full(length, 7)) == {7}
    assert kinds_of(np.repeat([3, 5, 3], length)) == {3, 5}
    serials = kinds_of(np.arange(length))
    assert serials == (frozenset(range(length)) if length <= FEW else None)


def test_prolonging_a_long_run_does_not_copy_it_each_time() -> None:
    run = elements([1] * 1000)
    rooms = set()
    for at in range(1000, 3000):
        run.prolong(elements([1], at))
        rooms.add(run.tokens.__array_interface__["data"][0])
    assert len(rooms) <= 4
