"""What kinds of things the world holds, and which relations lead from one kind to another."""

from dataclasses import dataclass

YEAR = "year"
"""The one relation whose value is a number; comparison questions ask about it."""


@dataclass(frozen=True)
class Relation:
    """`noun` is its only wording, so that tools and thoughts can copy it; `target` is the kind of its value."""

    noun: str
    target: str


SCHEMA: dict[str, tuple[Relation, ...]] = {
    "book": (Relation("author", "person"), Relation("publisher", "company"), Relation(YEAR, YEAR)),
    "device": (Relation("maker", "company"), Relation("designer", "person"), Relation(YEAR, YEAR)),
    "company": (Relation("founder", "person"), Relation("seat", "city"), Relation(YEAR, YEAR)),
    "person": (Relation("birthplace", "city"), Relation("teacher", "person"), Relation("employer", "company")),
    "city": (Relation("country", "country"), Relation("mayor", "person"), Relation("twin", "city")),
    "country": (Relation("capital", "city"), Relation("leader", "person"), Relation("rival", "country")),
}
"""For each kind its relations; a level uses the first few of them."""


def target_of(noun: str) -> str:
    """The kind of thing that `noun` leads to, e.g. `person` for `founder`."""
    return next(r.target for relations in SCHEMA.values() for r in relations if r.noun == noun)
