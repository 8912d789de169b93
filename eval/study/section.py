"""Records of a study as a section of a report: tables, pictures, and sentences that follow from the numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lragent.eval.records import Record
from lragent.eval.report.markdown import image, table
from lragent.eval.study.pictures import draw_accuracy, draw_cost
from lragent.eval.study.regimes import FOR_SHARING, REGIMES
from lragent.eval.study.summary import BASIS, Cell, Difference, Study
from lragent.modes import SharingMode

NONE, NOT_ALL_SEEDS = "-", "°"
SHARED = SharingMode.BASE_LR_SHARED.value
FULL = SharingMode.FULL_SHARED.value
MARGIN = 1.0
"""Points: a loss that is small enough to be called kept, where the whole interval is above it."""
LEAST_P = 1e-9
"""Smaller ones are not told apart."""
COSTS = {
    "iterations": "iterations",
    "turns": "turns",
    "context": "tokens in the end",
    "generated": "generated",
    "computed": "computed",
    "reused": "reused",
}
"""Means that are shown, with their heads. Seconds are not among them: of a study they are those of many questions, and
perhaps several processes, on one GPU."""


def section(records: Sequence[Record], pictures: Path) -> str:
    """Markdown with links to the PNGs that it writes to the folder `pictures`, which must exist.

    records: of kinds `answers` and `training` (others are passed over), of any levels. "" where there are no answers.
    Raises UserError where two records are of the same cell.
    """
    levels = list(dict.fromkeys(record["level"] for record in records if record["kind"] == "answers"))
    parts: list[str] = []
    for level in levels:
        own = [record for record in records if record["kind"] in ("answers", "training") and record["level"] == level]
        parts += _level(Study(own), pictures)
    return "\n\n".join(parts) + "\n" if parts else ""


def _level(study: Study, pictures: Path) -> list[str]:
    accuracy, cost = pictures / f"accuracy-{study.level}.png", pictures / f"cost-{study.level}.png"
    draw_accuracy(study, accuracy)
    parts = [
        f"### Right answers, level `{study.level}`",
        *_sentences(study),
        "In percent, mean over seeds, with the 95% interval for other questions (Wilson's). Tokens are those that "
        "training took (mean over seeds); healing's come after those of training apart." + _lacking(study),
        _right(study),
        *_healing(study),
        f"By seed ({', '.join(map(str, study.seeds))}; {NONE} where it was not asked), and in brackets the share of "
        "questions that got no answer within the limits.",
        _by_seed(study),
        image("Right answers by training and sharing mode", accuracy),
    ]
    if rows := _paired(study):
        parts += [
            f"### What each mode changes, level `{study.level}`",
            f"Against `{BASIS}` of the same roles, in the seeds and on the questions that both were asked: points, "
            "mean over seeds, with the 95% bootstrap interval (questions drawn anew within each seed), and McNemar's "
            "exact p of all questions together. Both speak of other questions, not of another training: for that the "
            "points by seed stand beside them. The last column is half the widest interval of one seed.",
            table(["trained", "served", "points", "p", "by seed", "questions", "±, one seed"], rows),
        ]
    if rows := _against_best(study):
        draw_cost(study, cost)
        parts += [
            f"### Against the best without sharing, level `{study.level}`",
            *_best_is(study),
            table(["", "against", "points", "p", "by seed", "questions"], rows),
            image("Points lost over tokens computed", cost),
        ]
    return [
        *parts,
        f"### By kind of question, level `{study.level}`",
        "Right answers in percent of the questions of all seeds together, which stand in brackets.",
        _kinds(study),
        f"### What a question costs, level `{study.level}`",
        "Means over the questions, and then over seeds: decisions of plan, turns that roles generated, tokens of the "
        "trajectory in the end; then, over all turns, tokens generated, prompt tokens that went through the model, and "
        "those found cached.",
        _costs(study),
    ]


# -- tables --------------------------------------------------------------------------------------------------------


def _by_mode(study: Study) -> tuple[list[str], list[tuple[str, list[Cell | None]]]]:
    """The modes that were asked, and for each regime its cells in them."""
    modes = [mode.value for mode in SharingMode if any(mode == asked for _, asked in study.cells)]
    return modes, [(regime, [study.cells.get((regime, mode)) for mode in modes]) for regime in study.regimes]


def _right(study: Study) -> str:
    modes, found = _by_mode(study)
    rows = [
        [
            _code(regime),
            REGIMES[regime],
            _tokens(study, regime),
            *(_share(cell) + NOT_ALL_SEEDS * _lacks_seeds(study, cell) if cell else NONE for cell in cells),
        ]
        for regime, cells in found
    ]
    return table(["trained", "how", "tokens", *map(_code, modes)], rows)


def _tokens(study: Study, regime: str) -> str:
    tokens = study.tokens(regime)
    if tokens is None:
        return NONE
    amount = f"{tokens / 1e6:.2f} M" if tokens >= 1e5 else f"{tokens:,.0f}"
    return f"+ {amount}" if regime == "healed" else amount


def _share(cell: Cell) -> str:
    low, high = cell.interval()
    return f"{100 * cell.share:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def _lacks_seeds(study: Study, cell: Cell) -> bool:
    return len(cell.by_seed) < len(study.seeds)


def _by_seed(study: Study) -> str:
    modes, found = _by_mode(study)
    rows = [[_code(regime), *(_shares(study, cell) if cell else NONE for cell in cells)] for regime, cells in found]
    return table(["trained", *map(_code, modes)], rows)


def _shares(study: Study, cell: Cell) -> str:
    shares = [f"{100 * cell.shares[seed]:.1f}" if seed in cell.shares else NONE for seed in study.seeds]
    return f"{', '.join(shares)} ({100 * cell.out_of_function:.1f})"


def _paired(study: Study) -> list[list[str]]:
    rows = []
    for regime, mode in study.cells:
        difference = study.from_exact(regime, mode)
        if mode != BASIS and difference is not None:
            rows.append([_code(regime), _code(mode), *_difference(study, difference), f"{difference.widest():.1f}"])
    return rows


def _against_best(study: Study) -> list[list[str]]:
    rows = []
    wanted = [(regime, mode) for regime, mode in study.cells if mode == SHARED]
    wanted += [(regime, FULL) for regime in ("shared", "mixed") if (regime, FULL) in study.cells]
    for regime, mode in wanted:
        difference = study.from_best(regime, mode)
        if difference is not None:
            rows.append([_named(regime, mode), f"the best {_code(BASIS)}", *_difference(study, difference)])
    healed = study.cells.get(("healed", SHARED))
    for mode in (BASIS, SHARED):  # what these adapters gave alone, and what they gave in one cache before
        before = study.cells.get(("apart", mode))
        difference = study.difference(before, healed) if before and healed else None
        if difference is not None:
            rows.append([_named("healed", SHARED), _named("apart", mode), *_difference(study, difference)])
    return rows


def _difference(study: Study, difference: Difference) -> list[str]:
    """Points with their interval, p, points by seed, questions."""
    low, high = difference.interval()
    return [
        f"{difference.points:+.1f} ({low:+.1f} to {high:+.1f})",
        _p(difference.total.mcnemar),
        _points(study, difference),
        f"{difference.total.total:,}",
    ]


def _points(study: Study, difference: Difference) -> str:
    pairs = difference.by_seed
    return ", ".join(f"{100 * pairs[seed].difference:+.1f}" if seed in pairs else NONE for seed in study.seeds)


def _p(p: float) -> str:
    return f"{p:.2g}" if p >= LEAST_P else f"< {LEAST_P:g}"


def _kinds(study: Study) -> str:
    cells = [cell for (_, mode), cell in study.cells.items() if mode in (BASIS, SHARED)]
    rows = []
    for cell in cells:
        counts = [cell.by_kind(kind) for kind in study.kinds]
        shares = [f"{100 * right / total:.1f} ({total:,})" if total else NONE for right, total in counts]
        rows.append([_code(cell.regime), _code(cell.mode), *shares])
    return table(["trained", "served", *study.kinds], rows)


def _costs(study: Study) -> str:
    rows = [
        [
            _code(cell.regime),
            _code(cell.mode),
            *(f"{cell.mean(name):,.1f}" if cell.mean(name) < 100 else f"{cell.mean(name):,.0f}" for name in COSTS),
            f"{100 * cell.out_of_function:.1f}",
        ]
        for cell in study.cells.values()
    ]
    return table(["trained", "served", *COSTS.values(), "no answer, %"], rows)


# -- sentences -----------------------------------------------------------------------------------------------------


def _sentences(study: Study) -> list[str]:
    """Whether roles keep the answers of the best that there is without sharing: first those that everyone has, trained
    apart, then those that learnt to share; and whether these need a cache of the modes that they learnt for."""
    said = []
    for regime, mode in (*((regime, SHARED) for regime in ("apart", *FOR_SHARING)), ("mixed", FULL)):
        difference = study.from_best(regime, mode) if (regime, mode) in study.cells else None
        if difference is None:
            continue
        low, high = difference.interval()
        of = f"a loss of more than {MARGIN:g} point"
        says = f"excludes {of}" if low > -MARGIN else f"shows {of}" if high < -MARGIN else f"does not exclude {of}"
        said.append(
            f"- {_named(regime, mode)}: {difference.points:+.1f} points against the best `{BASIS}` (by seed "
            f"{_points(study, difference)}); the 95% interval for other questions, {low:+.1f} to {high:+.1f}, {says}."
        )
    return ["\n".join(said)] if said else []


def _lacking(study: Study) -> str:
    some = any(_lacks_seeds(study, cell) for cell in study.cells.values())
    return f" {NOT_ALL_SEEDS} marks what was not asked in every seed." if some else ""


def _healing(study: Study) -> list[str]:
    """What healing ended by: it goes on until turns that were held out are predicted as well as each role did apart."""
    ends = [record["closed"] for record in study.trainings if "closed" in record]
    if not ends:
        return []
    often = f"{sum(ends)} of {len(ends)} seeds"
    return [
        f"Healing ended as turns were predicted as well as before sharing in {often}, else as its tokens were used up."
    ]


def _best_is(study: Study) -> list[str]:
    best = study.best
    if best is None:
        return []
    return [
        f"Of the teams that most seeds were asked without sharing, {_code(best.regime)} answers most: {_share(best)} "
        "percent. It was chosen on these questions, which favours it a little. Each row is paired on the questions "
        "that both were asked."
    ]


def _named(regime: str, mode: str) -> str:
    return f"{_code(regime)} in {_code(mode)}"


def _code(word: str) -> str:
    return f"`{word}`"
