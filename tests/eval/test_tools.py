"""The tools, on pages written by hand."""

import random

import pytest

from lragent.eval.world.levels import LEVELS
from lragent.eval.world.names import take_names
from lragent.eval.world.pages import Page, World, build_world
from lragent.eval.world.tools import LOOKUP, SEARCH, Desk, Library

PAGES = (
    Page(
        "Zenvor", "company", ("A company.", "The founder is Milbek.", "The seat is Lexzan.", "A founder of note."), {}
    ),
    Page("Milbek", "person", ("A person.", "Zenvor Zenvor Zenvor Zenvor made it rich."), {}),
)


@pytest.fixture
def desk() -> Desk:
    return Desk(Library(World({page.title: page for page in PAGES}), excerpt=2))


def test_search_shows_the_start_of_the_page_with_that_title(desk: Desk) -> None:
    assert desk.call(SEARCH, "Zenvor") == "Zenvor: A company. The founder is Milbek. ..."
    assert desk.call(SEARCH, " milbek?") == "Milbek: A person. Zenvor Zenvor Zenvor Zenvor made it rich."
    assert desk.call(SEARCH, "the seat of what") == "Zenvor: A company. The founder is Milbek. ..."


def test_search_says_when_it_finds_nothing(desk: Desk) -> None:
    assert desk.call(SEARCH, "Qwerty") == "No page found."
    assert desk.call(SEARCH, "?!") == "No page found."
    assert desk.call(SEARCH, "  ") == "Search needs an argument."


def test_lookup_walks_through_the_page_found_last(desk: Desk) -> None:
    assert desk.call(LOOKUP, "founder") == "Search for a page first."
    desk.call(SEARCH, "Zenvor")
    assert desk.call(LOOKUP, "founder") == "The founder is Milbek."
    assert desk.call(LOOKUP, "Founder") == "A founder of note."
    assert desk.call(LOOKUP, "founder") == "No more results."
    assert desk.call(LOOKUP, "found") == "No more results."
    assert desk.call(LOOKUP, "founder") == "The founder is Milbek."
    desk.call(SEARCH, "Zenvor")
    assert desk.call(LOOKUP, "founder") == "The founder is Milbek."
    assert desk.call(LOOKUP, "(") == "No more results."


def test_a_search_that_fails_keeps_the_last_page(desk: Desk) -> None:
    desk.call(SEARCH, "Zenvor")
    desk.call(SEARCH, "Qwerty")
    assert desk.call(LOOKUP, "seat") == "The seat is Lexzan."


def test_desks_share_a_library_and_nothing_else(desk: Desk) -> None:
    library = Library(World({page.title: page for page in PAGES}), excerpt=2)
    one, other = Desk(library), Desk(library)
    one.call(SEARCH, "Zenvor")
    assert other.call(LOOKUP, "seat") == "Search for a page first."


@pytest.mark.parametrize("name", LEVELS)
def test_every_title_finds_its_own_page(name: str) -> None:
    world = build_world(LEVELS[name], random.Random(0), take_names(random.Random(0), 180))
    library = Library(world, excerpt=1)
    for title in world.pages:
        page = library.best(title)
        assert page is not None
        assert page.title == title
