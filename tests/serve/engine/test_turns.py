"""The memory of generated turns: exact, bounded, and each tenant's own."""

from __future__ import annotations

from lragent.serve.engine.turns import ContextKey, ContextKeys, TurnMemory


def key(context: list[int], salt: str = "") -> ContextKey:
    return ContextKeys(salt).of(context)


def test_recalls_exactly_what_was_remembered() -> None:
    memory = TurnMemory()
    memory.remember(key([1, 2, 3], "a"), "the end", (7, 8))
    assert memory.recall(key([1, 2, 3], "a"), "the end") == [7, 8]
    assert memory.recall(key([1, 2, 3], "b"), "the end") is None, "another tenant found it"
    assert memory.recall(key([1, 2], "a"), "the end") is None
    assert memory.recall(key([1, 2, 4], "a"), "the end") is None
    assert memory.recall(key([1, 2, 3], "a"), "the end ") is None


def test_the_latest_ids_of_a_text_count() -> None:
    memory = TurnMemory()
    memory.remember(key([1]), "text", (5,))
    memory.remember(key([1]), "text", (6, 7))
    assert memory.recall(key([1]), "text") == [6, 7]


def test_what_is_recalled_is_the_callers_own() -> None:
    memory = TurnMemory()
    memory.remember(key([1]), "text", (5,))
    recalled = memory.recall(key([1]), "text")
    assert recalled is not None
    recalled.append(9)
    assert memory.recall(key([1]), "text") == [5]


def test_forgets_the_longest_unused_when_full() -> None:
    memory = TurnMemory(capacity=3)
    for token in range(3):
        memory.remember(key([token]), "text", (token,))
    memory.recall(key([0]), "text")
    memory.remember(key([3]), "text", (3,))
    assert [memory.recall(key([token]), "text") for token in range(4)] == [[0], None, [2], [3]]


def test_a_context_that_grows_has_the_keys_of_contexts_given_whole() -> None:
    keys = ContextKeys("a")
    grown = [keys.of(list(range(length))) for length in (0, 3, 3, 10)]
    assert grown == [key(list(range(length)), "a") for length in (0, 3, 3, 10)]
