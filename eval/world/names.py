"""Fictional names, so that no answer can be known without the tools.

Each syllable is one token of SmolLM2's vocabulary, with and without a space before it, and the pairs were chosen so
that most names stay two tokens: training tokens are precious on a CPU.
"""

import itertools
import random

FIRST = tuple(  # Quoted one by one, forty-eight syllables would be harder to read.
    """Bal Bel Bol Bur Cor Dav Del Fer Fil Gal Gen Hal Hel Hol Hur Jul Ken Lev Lex Lin Mel Mer Mil Mur Nav Nor Pal Pen
    Pol Ram Ren Rom Ros Sal Sel Sil Sol Sov Sur Tam Tel Tur Val Vel Vir Vol Wil Zen""".split()  # noqa: SIM905
)
LATER = tuple(
    """bek bor bras gex hak hin jar jin kal lam lux mir mol nam nex pox ral rath reth rex ril rox stad thal thur tok vas
    vik vol vor wen zan zar zek zil zon""".split()  # noqa: SIM905
)


def take_names(rng: random.Random, count: int) -> list[str]:
    """`count` distinct names in random order: of two syllables while they last, then also of three.

    One call serves all worlds of a data set, which makes their names disjoint by construction.
    """
    names = [first + later for first, later in itertools.product(FIRST, LATER)]
    if count > len(names):
        longer = [first + middle + last for first, middle, last in itertools.product(FIRST, LATER, LATER)]
        if count > len(names) + len(longer):
            raise ValueError(f"{count} names wanted, only {len(names) + len(longer)} exist")
        names += rng.sample(longer, count - len(names))
    return rng.sample(names, count)
