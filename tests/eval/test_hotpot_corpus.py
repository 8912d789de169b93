"""Passages of what tools once said, and the tools over them."""

from __future__ import annotations

import pytest
from autoact_rows import VERDICT, about, row
from hypothesis import given
from hypothesis import strategies as st

from lragent.eval.hotpot.corpus import Passage, passages_of
from lragent.eval.hotpot.tools import LONGEST, Shelf, ShelfDesk, sentences

ERRORS = (
    "bingSearch error, please try again.",
    "Bing search error",
    "Invalid Action. Valid Actions are Lookup[<topic>] and Finish[<answer>].",
    "Invalid action. Reflect only follows the Finish action.",
    "Could not find that page, please try again.",
    "Could not find [Ombel]. Similar: ['Ombel Lake', 'Ombelo']",
    "No Results",
    "No More Results",
    "The last page Retrieved was not found, so you cannot Lookup a keyword in it.",
    "The last page Searched was not found, so you cannot Lookup a keyword in it.",
    "The answer maybe wrong, please try to solve the question again.",
    "Please reflect your answer.",
    "Answer is CORRECT",
    "Answer is INCORRECT",
)
ACTIONS = ("BingSearch[x]", "Retrieve[x]", "Lookup[x]", "Finish[x]", "Reflect[right]", "no action at all")


def test_passages_are_what_was_found_each_once_under_all_names() -> None:
    rows = [
        about("Ombel", "40"),
        about("Ombel", "40"),
        row("?", "x", [("", "Retrieve[Lake Ombel]", "Ombel is a lake. It lies in the hills.")]),
        row("?", "x", [("", "BingSearch[lakes]", "No results could be more different.")]),
        row("?", "x", [("", "Lookup[deep]", "(Result 2/3) Deep waters run still.")]),
    ]
    page = "Ombel is a lake. It lies in the hills. The depth of Ombel is 40 m. Its depth varies by season."
    assert passages_of(rows) == [
        Passage(page, ("Ombel", "Lake Ombel")),
        Passage("No results could be more different."),
        Passage("Deep waters run still."),
    ]


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("text", ERRORS)
def test_what_the_environment_says_of_the_agent_is_no_passage(action: str, text: str) -> None:
    assert passages_of([row("?", "x", [("t", action, text)])]) == []


@given(
    st.lists(
        st.tuples(st.sampled_from(ACTIONS), st.sampled_from(("", "Ombel is deep. ", "Ombel is deep.\n")), st.booleans())
    )
)
def test_no_tool_ever_gives_a_verdict(steps: list[tuple[str, str, bool]]) -> None:
    """Wherever in an observation it stands, and whatever action came before."""
    made = row("?", "x", [("t", action, text + VERDICT * judged) for action, text, judged in steps])
    passages = passages_of([made])
    assert not any("CORRECT" in passage.text for passage in passages)
    desk = ShelfDesk(Shelf(passages))
    for tool, argument in (("BingSearch", "answer is correct ombel"), ("Lookup", "correct"), ("Retrieve", "x")):
        assert "CORRECT" not in desk.call(tool, argument)


@pytest.fixture
def desk() -> ShelfDesk:
    rows = [about(lake, depth) for lake, depth in (("Ombel", "40"), ("Lake Tarn", "9"), ("Lake Suld", "210"))]
    return ShelfDesk(Shelf(passages_of(rows)))


def test_search_finds_by_words_and_retrieve_by_name_only(desk: ShelfDesk) -> None:
    assert desk.call("BingSearch", "how deep is Suld?").startswith("Lake Suld is a lake.")
    assert desk.call("BingSearch", "qwerty") == "Could not find that page, please try again."
    assert desk.call("Retrieve", " lake tarn ").startswith("Lake Tarn is a lake.")
    assert desk.call("Retrieve", "Tarn") == "Could not find [Tarn]. Similar: ['Lake Tarn']"
    assert desk.call("Retrieve", "qwerty") == "Could not find that page, please try again."
    assert desk.call("Retrieve", " ") == "Retrieve needs an argument."
    assert desk.call("Finish", "") == "Finish needs an argument."


def test_lookup_goes_on_to_the_next_sentence(desk: ShelfDesk) -> None:
    assert desk.call("Lookup", "depth") == "Invalid action. Lookup only follows the Retrieve or BingSearch action."
    desk.call("Retrieve", "Ombel")
    desk.call("Retrieve", "qwerty")  # found nothing: the page found last stays
    assert desk.call("Lookup", "depth") == "(Result 1/2) The depth of Ombel is 40 m."
    assert desk.call("Lookup", "Depth") == "(Result 2/2) Its depth varies by season."
    assert desk.call("Lookup", "depth") == "No More Results"
    assert desk.call("Lookup", "hills") == "(Result 1/1) It lies in the hills."
    assert desk.call("Lookup", "depth") == "(Result 1/2) The depth of Ombel is 40 m."
    assert desk.call("Lookup", "(qwerty") == "No Results"
    desk.call("BingSearch", "Suld")
    assert desk.call("Lookup", "depth") == "(Result 1/2) The depth of Lake Suld is 210 m."


def test_desks_share_a_shelf_and_nothing_else() -> None:
    shelf = Shelf(passages_of([about("Ombel", "40")]))
    one, other = ShelfDesk(shelf), ShelfDesk(shelf)
    one.call("Retrieve", "Ombel")
    assert other.call("Lookup", "depth").startswith("Invalid action")


def test_sentences_end_where_a_reader_ends_them() -> None:
    text = "F. Scott wrote it in the U.S. in 1925. It is 3.5 m long.The end was “sad.” Was it?"
    assert sentences(text) == [
        "F. Scott wrote it in the U.S. in 1925.",
        "It is 3.5 m long.",
        "The end was “sad.” Was it?",
    ]


@given(st.lists(st.integers(1, 900), min_size=1, max_size=8), st.sampled_from(("BingSearch", "Retrieve", "Lookup")))
def test_no_answer_is_longer_than_allowed(lengths: list[int], tool: str) -> None:
    text = " ".join(f"W{'o' * length}rd ombel." for length in lengths)
    desk = ShelfDesk(Shelf([Passage(text, ("ombel",))]))
    shown = desk.call("BingSearch", "ombel")
    assert len(desk.call(tool, "ombel")) <= LONGEST
    if len(text) > LONGEST:
        assert shown.endswith("ombel. ...")
        assert text.startswith(shown.removesuffix(" ..."))
    else:
        assert shown == text


def test_a_sentence_that_is_too_long_is_cut_off() -> None:
    shown = ShelfDesk(Shelf([Passage("ombel " * 1_000)])).call("BingSearch", "ombel")
    assert len(shown) == LONGEST
    assert shown.endswith(" ...")
