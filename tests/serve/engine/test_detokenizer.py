"""Text piece by piece equals the text decoded whole, and no stop string is ever sent, not even its beginning."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_tokenizer

from lragent.serve.engine.detokenizer import Detokenizer
from lragent.serve.engine.types import SamplingParams

QUICK = settings(max_examples=150, deadline=None)
TEXTS = st.text(st.sampled_from("the and€é漢🙂\u200d \n<"), max_size=30)


@cache
def tokenizer():
    return tiny_tokenizer()


def decode(ids: list[int]) -> str:
    return tokenizer().decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def encode(text: str) -> list[int]:
    return tokenizer()(text, add_special_tokens=False)["input_ids"]


def pieces(ids: list[int], *stop: str) -> tuple[list[str], Detokenizer]:
    detokenizer = Detokenizer(tokenizer(), SamplingParams(stop=stop))
    sent = []
    for token in ids:
        sent.append(detokenizer.push(token))
        if detokenizer.stopped:
            break
    return [*sent, detokenizer.finish()], detokenizer


@QUICK
@given(TEXTS)
def test_text_equals_a_plain_decode(text: str) -> None:
    sent, detokenizer = pieces(encode(text))
    assert "".join(sent) == detokenizer.text == text
    assert not any("\ufffd" in piece for piece in sent), "half a character was sent"


@QUICK
@given(st.lists(st.integers(0, 282), max_size=40))
def test_any_tokens_at_all_equal_a_plain_decode(ids: list[int]) -> None:
    """Special tokens and bytes that are no text included."""
    sent, detokenizer = pieces(ids)
    assert "".join(sent) == detokenizer.text == decode(ids)


def test_a_character_is_sent_when_its_last_byte_is_there() -> None:
    ids = encode("a🙂b")
    assert len(ids) == 6
    assert pieces(ids)[0] == ["a", "", "", "", "🙂", "b", ""]


def test_an_answer_cut_within_a_character_says_so() -> None:
    assert pieces(encode("a🙂")[:-1])[0] == ["a", "", "", "", "\ufffd"]


@QUICK
@given(TEXTS, st.lists(st.text("the an€<", min_size=1, max_size=5), min_size=1, max_size=3))
def test_stops_before_the_first_stop_string(text: str, stop: list[str]) -> None:
    cuts = [text.find(each) for each in stop if each in text]
    sent, detokenizer = pieces(encode(text), *stop)
    assert detokenizer.stopped == bool(cuts)
    assert "".join(sent) == detokenizer.text
    # The first that is complete ends the answer; one that begins earlier may be complete only later.
    assert detokenizer.text == text[: len(detokenizer.text)]
    assert not any(each in detokenizer.text for each in stop)
    if len(stop) == 1 or not cuts:
        assert detokenizer.text == (text[: min(cuts)] if cuts else text)


def test_a_stop_string_that_spans_tokens_is_held_back_from_its_first_character() -> None:
    ids = encode("x<|end")
    sent, detokenizer = pieces(ids, "<|end")
    assert sent[0] == "x"
    assert set(sent[1:]) == {""}
    assert detokenizer.stopped


def test_what_only_looked_like_a_stop_string_is_sent_in_the_end() -> None:
    sent, detokenizer = pieces(encode("x<|e"), "<|end")
    assert sent[:1] == ["x"]
    assert sent[-1] == "<|e"
    sent, _ = pieces(encode("x<|e y"), "<|end")
    assert sent[-3:] == ["<|e ", "y", ""]
    assert not detokenizer.stopped


@pytest.mark.parametrize("stop", ["aab", "aaab", "abab"])
def test_a_stop_string_that_overlaps_itself_is_found(stop: str) -> None:
    text = "aaaab" if stop.startswith("aa") else "aababab"
    sent, _ = pieces([token for letter in text for token in encode(letter)], stop)
    assert "".join(sent) == text[: text.index(stop)]


def test_much_rubbish_is_not_decoded_again_and_again() -> None:
    """A model that has gone astray may send bytes that are never a character."""
    half = encode("🙂")[:1]
    lengths = []
    detokenizer = Detokenizer(tokenizer(), SamplingParams())
    decode = detokenizer._decode
    detokenizer._decode = lambda start, end: lengths.append(end - start) or decode(start, end)  # type: ignore
    sent = "".join(detokenizer.push(half[0]) for _ in range(300))
    assert max(lengths) < 64
    assert sent + detokenizer.finish() == "\ufffd" * 300
