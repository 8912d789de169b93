"""Questions over a world, none of which can be answered without its pages.

Open questions ask for a name that stands on no page before the last one; yes/no and comparison questions are balanced
exactly, so that a guess is right half of the time at most.
"""

import random
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from lragent.errors import UserError
from lragent.eval.world.levels import Level
from lragent.eval.world.pages import World
from lragent.eval.world.schema import SCHEMA, YEAR, target_of

OPEN_HOPS = {"two_hop": 2, "three_hop": 3}
"""Kinds of open questions, and how many facts each chains."""
_PATIENCE = 1_000
"""Draws in a row without a new question, before the world counts as too small."""


@dataclass(frozen=True)
class Path:
    """Where one side of a question starts, and the relations to follow from there."""

    start: str
    nouns: tuple[str, ...]

    def phrase(self, hops: int) -> str:
        """The entity after `hops` relations, in words: `the founder of Zenvor`."""
        return "".join(f"the {noun} of " for noun in reversed(self.nouns[:hops])) + self.start


@dataclass(frozen=True)
class Question:
    """`paths` has one entry for open questions, two for `yes_no` and `comparison`."""

    id: str
    kind: str
    text: str
    answer: str
    paths: tuple[Path, ...]


def make_questions(world: World, level: Level, rng: random.Random, count: int, prefix: str) -> list[Question]:
    """`count` different questions in the level's mix, in random order, with ids `prefix-0`, `prefix-1`, …

    Raises `UserError` when the world is too small for so many.
    """
    draws = _Draws(world, level, rng)
    questions: list[Question] = []
    for kind, quota in _quotas(level.mix, count).items():
        questions += draws.different(kind, quota)
    rng.shuffle(questions)
    return [Question(f"{prefix}-{i}", q.kind, q.text, q.answer, q.paths) for i, q in enumerate(questions)]


def chains(kind: str, length: int, relations: int) -> Iterator[tuple[str, ...]]:
    """All chains of `length` relations from `kind` through entities, none repeated, the last one never a year."""
    for relation in SCHEMA[kind][:relations]:
        if relation.target == YEAR:
            continue
        if length == 1:
            yield (relation.noun,)
            continue
        for rest in chains(relation.target, length - 1, relations):
            if relation.noun not in rest:
                yield (relation.noun, *rest)


class _Draws:
    """Draws questions from one world, kind by kind."""

    def __init__(self, world: World, level: Level, rng: random.Random) -> None:
        self.world, self.level, self.rng = world, level, rng
        self.by_kind: dict[str, list[str]] = defaultdict(list)
        for page in world.pages.values():
            self.by_kind[page.kind].append(page.title)

    def different(self, kind: str, quota: int) -> list[Question]:
        found: dict[str, Question] = {}
        misses = 0
        while len(found) < quota:
            first_half = len(found) % 2 == 0
            question = self._open(kind) if kind in OPEN_HOPS else self._pair(kind, first_half)
            if question is not None and question.text not in found:
                found[question.text] = question
                misses = 0
                continue
            misses += 1
            if misses == _PATIENCE:
                raise UserError(
                    f"count: the world has no {quota} different '{kind}' questions; ask for fewer, or add entities."
                )
        return list(found.values())

    def _open(self, kind: str) -> Question | None:
        start_kind = self.rng.choice(list(self.by_kind))
        nouns = self.rng.choice(list(chains(start_kind, OPEN_HOPS[kind], self.level.relations)))
        path = Path(self.rng.choice(self.by_kind[start_kind]), nouns)
        names = self.world.follow(path.start, nouns)
        if len(set(names)) < len(names) or self._told_early(names):
            return None
        asks = "Who" if target_of(nouns[-1]) == "person" else "What"
        texts = [f"{asks} is {path.phrase(len(nouns))}?"]
        if self.level.paraphrases:
            texts += [f"Name {path.phrase(len(nouns))}.", f"Find out {asks.lower()} {path.phrase(len(nouns))} is."]
        return Question("", kind, self.rng.choice(texts), names[-1], (path,))

    def _told_early(self, names: list[str]) -> bool:
        """Whether the answer stands on a page other than the last one of the chain, so that a hop could be skipped."""
        answer = re.compile(rf"\b{names[-1]}\b")
        return any(answer.search(self.world.pages[name].text) for name in names[:-2])

    def _pair(self, kind: str, first_half: bool) -> Question | None:
        """`first_half`: the answer is yes, or the thing named first."""
        hops = self.rng.randint(1, self.level.pair_hops)
        start_kind = self.rng.choice(list(self.by_kind))
        if kind == "yes_no":
            options = list(chains(start_kind, hops, self.level.relations))
        else:
            options = _year_chains(start_kind, hops, self.level.relations)
        if not options:
            return None
        nouns = self.rng.choice(options)
        walks = {start: self.world.follow(start, nouns) for start in self.by_kind[start_kind]}
        left = self.rng.choice(self.by_kind[start_kind])
        fits = [
            right
            for right, walk in walks.items()
            if not set(walk[:-1]) & set(walks[left]) and not set(walks[left][:-1]) & set(walk)
            if self._pair_fits(kind, first_half, walks[left][-1], walk[-1])
        ]
        if not fits:
            return None
        right = self.rng.choice(fits)
        sides = (Path(left, nouns), Path(right, nouns))
        phrases = [side.phrase(hops - 1) for side in sides]
        if kind == "yes_no":
            text = f"Do {phrases[0]} and {phrases[1]} have the same {nouns[-1]}?"
            return Question("", kind, text, "yes" if first_half else "no", sides)
        text = f"Which has the earlier {nouns[-1]}, {phrases[0]} or {phrases[1]}?"
        return Question("", kind, text, walks[left if first_half else right][-2], sides)

    def _pair_fits(self, kind: str, first_half: bool, left: str, right: str) -> bool:
        if kind == "yes_no":
            return (left == right) == first_half
        gap = int(right) - int(left)
        return (gap if first_half else -gap) >= self.level.year_gap


def _year_chains(kind: str, hops: int, relations: int) -> list[tuple[str, ...]]:
    """Chains of `hops` relations from `kind` that end in a year."""
    heads: list[tuple[str, ...]] = [()] if hops == 1 else list(chains(kind, hops - 1, relations))
    ends = {head: target_of(head[-1]) if head else kind for head in heads}
    return [(*head, YEAR) for head, end in ends.items() if any(r.noun == YEAR for r in SCHEMA[end][:relations])]


def _quotas(mix: Mapping[str, float], count: int) -> dict[str, int]:
    """Whole numbers in the proportions of `mix` that sum to `count` (largest remainders)."""
    total = sum(mix.values())
    exact = {kind: count * share / total for kind, share in mix.items()}
    quotas = {kind: int(value) for kind, value in exact.items()}
    by_remainder = sorted(exact, key=lambda kind: quotas[kind] - exact[kind])
    for kind in by_remainder[: count - sum(quotas.values())]:
        quotas[kind] += 1
    return quotas
