"""The memory of generated turns: exact, bounded, and each tenant's own."""

from __future__ import annotations

from lragent.serve.engine.turns import TurnMemory


def test_recalls_exactly_what_was_remembered() -> None:
    memory = TurnMemory()
    memory.remember("a", [1, 2, 3], "the end", (7, 8))
    assert memory.recall("a", (1, 2, 3), "the end") == [7, 8]
    assert memory.recall("b", [1, 2, 3], "the end") is None, "another tenant found it"
    assert memory.recall("a", [1, 2], "the end") is None
    assert memory.recall("a", [1, 2, 4], "the end") is None
    assert memory.recall("a", [1, 2, 3], "the end ") is None


def test_the_latest_ids_of_a_text_count() -> None:
    memory = TurnMemory()
    memory.remember("", [1], "text", (5,))
    memory.remember("", [1], "text", (6, 7))
    assert memory.recall("", [1], "text") == [6, 7]


def test_what_is_recalled_is_the_callers_own() -> None:
    memory = TurnMemory()
    memory.remember("", [1], "text", (5,))
    recalled = memory.recall("", [1], "text")
    assert recalled is not None
    recalled.append(9)
    assert memory.recall("", [1], "text") == [5]


def test_forgets_the_longest_unused_when_full() -> None:
    memory = TurnMemory(capacity=3)
    for token in range(3):
        memory.remember("", [token], "text", (token,))
    memory.recall("", [0], "text")
    memory.remember("", [3], "text", (3,))
    assert [memory.recall("", [token], "text") for token in range(4)] == [[0], None, [2], [3]]
