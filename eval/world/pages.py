"""A world: one page per entity, and the facts that the pages state."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lragent.eval.world.levels import Level
from lragent.eval.world.schema import SCHEMA, YEAR, Relation

_FILLERS = (
    "Visitors from {other} praise the {adjective} {thing}.",
    "A {adjective} {thing} was once sent to {other}.",
    "Many stories tell of the {adjective} {thing}.",
    "Nobody knows what became of the {adjective} {thing}.",
    "It is often compared with {other}.",
    "In the north, {other} is better known.",
    "The {adjective} {thing} was lost and found again.",
    "Old letters mention {other} and a {adjective} {thing}.",
    "Each spring a {adjective} {thing} is shown to the public.",
    "Some say that {other} had the first {thing}.",
)
_ADJECTIVES = (
    "quiet",
    "golden",
    "broken",
    "dusty",
    "bright",
    "heavy",
    "hidden",
    "narrow",
    "famous",
    "wooden",
    "silver",
)
_THINGS = (
    "bridge",
    "garden",
    "lamp",
    "song",
    "ship",
    "clock",
    "mirror",
    "tower",
    "painting",
    "festival",
    "bell",
    "map",
)


@dataclass(frozen=True)
class Fact:
    """The value of one relation of a page, and the index of the sentence that states it."""

    value: str
    sentence: int


@dataclass(frozen=True)
class Page:
    """What the tools can show of one entity. `facts` is what the oracle knows about `sentences`."""

    title: str
    kind: str
    sentences: tuple[str, ...]
    facts: Mapping[str, Fact]

    @property
    def text(self) -> str:
        return " ".join(self.sentences)


@dataclass(frozen=True)
class World:
    """All pages by title. A value that is not a year is the title of another page of the same world."""

    pages: Mapping[str, Page]

    def follow(self, start: str, nouns: Sequence[str]) -> list[str]:
        """`start` and the values met by following `nouns` one after another: length `len(nouns) + 1`."""
        path = [start]
        for noun in nouns:
            path.append(self.pages[path[-1]].facts[noun].value)
        return path


def build_world(level: Level, rng: random.Random, names: Sequence[str]) -> World:
    """A world whose entities are `names`, shared out evenly among the kinds of the schema."""
    share = len(names) // len(SCHEMA)
    if share < 2:
        raise ValueError(f"{len(names)} names are too few: each of the {len(SCHEMA)} kinds needs two")
    members = {kind: list(names[i * share : (i + 1) * share]) for i, kind in enumerate(SCHEMA)}
    values = {
        name: {relation.noun: _draw_value(relation, name, members, rng) for relation in SCHEMA[kind][: level.relations]}
        for kind, titles in members.items()
        for name in titles
    }
    pages = [
        _write_page(name, kind, values, members, level, rng) for kind, titles in members.items() for name in titles
    ]
    return World({page.title: page for page in pages})


def _draw_value(relation: Relation, owner: str, members: Mapping[str, list[str]], rng: random.Random) -> str:
    if relation.target == YEAR:
        return str(rng.randint(1000, 1999))
    value = owner
    while value == owner:
        value = rng.choice(members[relation.target])
    return value


def _write_page(
    title: str,
    kind: str,
    values: Mapping[str, Mapping[str, str]],
    members: Mapping[str, list[str]],
    level: Level,
    rng: random.Random,
) -> Page:
    """Facts, fillers and distractors in random order after a first sentence that says what the entity is."""
    others = [name for name in rng.sample(members[kind], min(len(members[kind]), 40)) if name != title]
    drafts: list[tuple[str | None, str]] = [
        (noun, _fact_sentence(title, noun, value, level.paraphrases, rng)) for noun, value in values[title].items()
    ]
    for other in rng.choices(others, k=rng.randint(*level.distractors)):
        noun, value = rng.choice(list(values[other].items()))
        drafts.append((None, f"The {noun} of {other} is {value}."))
    for other in rng.choices(others, k=rng.randint(*level.fillers)):
        template = rng.choice(_FILLERS)
        words = {"other": other, "adjective": rng.choice(_ADJECTIVES), "thing": rng.choice(_THINGS)}
        drafts.append((None, template.format(**words)))
    rng.shuffle(drafts)
    facts = {noun: Fact(values[title][noun], i) for i, (noun, _) in enumerate(drafts, start=1) if noun is not None}
    return Page(title, kind, (f"A {kind}.", *(sentence for _, sentence in drafts)), facts)


def _fact_sentence(title: str, noun: str, value: str, paraphrases: bool, rng: random.Random) -> str:
    wordings = [f"The {noun} is {value}."]
    if paraphrases:
        wordings += [f"{value} is the {noun}.", f"The {noun} of {title} is {value}."]
    return rng.choice(wordings)
