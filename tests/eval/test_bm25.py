"""BM25: which texts come first, and that nothing is found where nothing matches."""

from __future__ import annotations

from lragent.eval.bm25 import Index

TEXTS = ("The sea is salt.", "A salt lake, a salt pan, a salt mine.", "It&#39;s a lake", "A lake it is")


def test_the_best_texts_come_first_and_of_equals_the_earlier() -> None:
    index = Index(TEXTS)
    assert index.best("SALT pan!") == [1]
    assert index.best("pan sea", 4) == [0, 1]
    assert index.best("salt", 4)[0] == 1
    assert Index(("a lake", "a sea", "a lake")).best("lake", 3) == [0, 2]


def test_a_word_is_read_as_a_reader_sees_it() -> None:
    assert Index(TEXTS).best("39") == []
    assert Index(TEXTS).best("it's") == [2]


def test_nothing_is_found_where_nothing_matches() -> None:
    assert Index(TEXTS).best("qwerty", 4) == Index(TEXTS).best("?!") == []
    assert Index(()).best("salt") == Index(("", "?")).best("salt") == []
    assert Index(("", "?")).scores("salt").tolist() == [0.0, 0.0]
