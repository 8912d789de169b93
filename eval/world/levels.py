"""The levels of difficulty, from what a laptop learns in minutes to contexts of thousands of tokens."""

from collections.abc import Mapping
from dataclasses import dataclass

from lragent.errors import UserError
from lragent.eval.world.form import Form

SHORT_SYSTEM = "Tools: Search, Lookup, Finish."
FULL_SYSTEM = (
    "Answer the question with tools. Each turn, plan says what is needed and names a tool, then action gives the "
    "tool's argument. Search[title] shows the start of the best page. Lookup[keyword] shows the next sentence of that "
    "page that has the keyword. Finish[answer] ends; then reflect says whether the answer is right or wrong."
)


@dataclass(frozen=True)
class Level:
    """All that makes one level harder than another. Ranges are inclusive."""

    name: str
    mix: Mapping[str, float]
    """Share of each kind of question: `two_hop`, `three_hop`, `yes_no`, `comparison`."""
    train_count: int
    eval_count: int
    test_count: int
    train_entities: int
    """Entities of each kind in the training world."""
    test_entities: int
    """Entities of each kind in the evaluation world, and again in the test world."""
    relations: int
    """How many of the schema's relations each page states."""
    fillers: tuple[int, int] = (0, 0)
    """Sentences per page that answer nothing."""
    distractors: tuple[int, int] = (0, 0)
    """Sentences per page that state a relation of another entity of the same kind."""
    excerpt: int = 1_000
    """Sentences that Search shows; the rest of a page is found by Lookup only."""
    paraphrases: bool = False
    """Whether facts and questions are worded in more than one way."""
    pair_hops: int = 1
    """Hops on each side of a yes/no or comparison question, at most."""
    year_gap: int = 50
    """Least difference of the years that a comparison asks about."""
    wrong_first: float = 0.1
    """Share of open questions to which the oracle first gives a wrong answer, for reflect to send back."""
    wrong_first_pairs: float = 0.0
    """The same for yes/no and comparison questions."""
    split_turns: bool = False
    """Whether thought and tool name, reason and verdict, are turns of their own, as in the paper."""
    system: str = SHORT_SYSTEM

    @property
    def form(self) -> Form:
        """The form of this level's trajectories, which the agent loop needs."""
        return Form(self.system, self.split_turns)


LEVELS: dict[str, Level] = {
    level.name: level
    for level in (
        Level(
            name="demo",
            mix={"two_hop": 0.8, "yes_no": 0.2},
            train_count=600,
            eval_count=40,
            test_count=60,
            train_entities=120,
            test_entities=60,
            relations=2,
        ),
        Level(
            name="easy",
            mix={"two_hop": 0.6, "yes_no": 0.2, "comparison": 0.2},
            train_count=2_000,
            eval_count=100,
            test_count=300,
            train_entities=240,
            test_entities=60,
            relations=3,
            fillers=(1, 2),
            wrong_first_pairs=0.1,
        ),
        Level(
            name="medium",
            mix={"two_hop": 0.4, "three_hop": 0.3, "yes_no": 0.15, "comparison": 0.15},
            train_count=2_000,
            eval_count=100,
            test_count=500,
            train_entities=240,
            test_entities=80,
            relations=3,
            fillers=(3, 6),
            distractors=(1, 2),
            excerpt=6,
            paraphrases=True,
            wrong_first_pairs=0.1,
        ),
        Level(
            name="hard",
            mix={"two_hop": 0.2, "three_hop": 0.5, "yes_no": 0.15, "comparison": 0.15},
            train_count=4_000,
            eval_count=100,
            test_count=1_000,
            train_entities=300,
            test_entities=100,
            relations=3,
            fillers=(24, 44),
            distractors=(3, 6),
            excerpt=32,
            paraphrases=True,
            pair_hops=2,
            wrong_first_pairs=0.1,
            split_turns=True,
            system=FULL_SYSTEM,
        ),
        Level(
            name="long",
            mix={"two_hop": 0.3, "three_hop": 0.5, "yes_no": 0.1, "comparison": 0.1},
            train_count=2_000,
            eval_count=50,
            test_count=300,
            train_entities=300,
            test_entities=100,
            relations=3,
            fillers=(180, 260),
            distractors=(6, 12),
            excerpt=200,
            paraphrases=True,
            wrong_first_pairs=0.1,
            split_turns=True,
            system=FULL_SYSTEM,
        ),
    )
}


def level_named(name: str) -> Level:
    """The level of that name; `UserError` when there is none."""
    if name not in LEVELS:
        raise UserError(f"level: there is no level '{name}'; choose one of {', '.join(LEVELS)}.")
    return LEVELS[name]
