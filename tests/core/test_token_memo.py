"""Texts are tokenised once while they are remembered, and what is remembered is bounded."""

import tracemalloc
from array import array

from hypothesis import given
from hypothesis import strategies as st

from lragent.token_memo import TokenMemo, size_of


class _Tokenizer:
    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, texts: list[str]) -> list[list[int]]:
        self.asked += texts
        return [[ord(character) for character in text] for text in texts]


def test_a_conversation_that_comes_back_is_not_tokenised_again() -> None:
    tokenizer = _Tokenizer()
    memo = TokenMemo(tokenizer)
    memo(["system", "user"])
    answer = memo(["system", "user", "reply", "reply"])
    assert tokenizer.asked == ["system", "user", "reply"]
    assert [list(ids) for ids in answer] == tokenizer(["system", "user", "reply", "reply"])


def test_the_least_recently_used_is_forgotten_and_too_long_a_text_is_never_kept() -> None:
    tokenizer = _Tokenizer()
    memo = TokenMemo(tokenizer, kept=2 * size_of("aa", array("i", [0, 0])))
    for text in ("aa", "bb", "aa", "cc"):  # cc pushes bb out
        memo([text])
    tokenizer.asked.clear()
    memo(["aa", "cc", "1" * 400])
    assert tokenizer.asked == ["1" * 400]
    memo(["bb", "1" * 400])
    assert tokenizer.asked == ["1" * 400, "bb", "1" * 400]


@given(st.lists(st.lists(st.text("abc", max_size=4), max_size=5), max_size=20), st.integers(0, 1200))
def test_the_ids_are_always_the_tokenizers(calls: list[list[str]], kept: int) -> None:
    memo = TokenMemo(_Tokenizer(), kept=kept)
    for texts in calls:
        assert [list(ids) for ids in memo(texts)] == _Tokenizer()(texts)
        assert memo._bytes == sum(size_of(text, ids) for text, ids in memo._ids.items()) <= kept


def test_many_short_texts_take_no_more_memory_than_was_given() -> None:
    memo, kept = TokenMemo(_Tokenizer(), kept=200_000), 200_000
    memo._tokenise = lambda texts: [[1] for _ in texts]
    tracemalloc.start()
    try:
        for number in range(5_000):
            memo([str(number)])
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(memo._ids) > 300, "they are remembered"
    assert used < 1.5 * kept
