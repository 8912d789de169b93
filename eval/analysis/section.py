"""Records of caches and next tokens as a section of a report: tables, and the pictures that they link to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lragent.eval.analysis.divergence import COMPARED
from lragent.eval.analysis.forced import SHARED
from lragent.eval.analysis.pictures import Curves, draw
from lragent.eval.analysis.similarity import ADAPTER, FULL_V, KEY, KEY_ADAPTER, KEY_LR, LR, V_BASE
from lragent.eval.records import Record
from lragent.eval.report.markdown import image, table

WHATS = (KEY, V_BASE, FULL_V, ADAPTER, LR, KEY_ADAPTER, KEY_LR)
LEAST_SHARE = 0.1
"""A step that fewer of the trajectories reach is left out of the picture."""


def section(records: Sequence[Record], pictures: Path) -> str:
    """Markdown with links to the PNGs that it writes to the folder `pictures`, which must exist.

    records: of kinds `similarity` and `divergence` (others are passed over), of any number of labels; several runs of
    one label are averaged. Links begin with the folder's name.
    """
    parts = []
    if alike := [record for record in records if record["kind"] == "similarity"]:
        parts += _similarity(alike, pictures)
    if moved := [record for record in records if record["kind"] == "divergence"]:
        parts += _divergence(moved, pictures)
    return "\n\n".join(filter(None, parts)) + "\n" if parts else ""


# -- caches --------------------------------------------------------------------------------------------------------


def _similarity(records: Sequence[Record], pictures: Path) -> list[str]:
    labels, whats = _labels(records), [what for what in WHATS if any(record["what"] == what for record in records)]
    among = [record for record in records if not {"base", SHARED} & set(record["pair"])]
    own = [record for record in records if record["pair"][1] == SHARED and record["pair"][0] != "base"]

    def rows(some: Sequence[Record]) -> list[list[str]]:
        return [[label, *(_lowest(_of(some, label=label, what=what)) for what in whats)] for label in labels]

    parts = [
        "### How alike the caches of roles are",
        "Cosine between what roles leave for the same token of the same text, each alone over the whole of it: the "
        "mean over tokens, layers and pairs of roles, and in brackets that of the layer where it is lowest. `full V` "
        "is `V_base` and the role's own adapter output, which is the LR cache times the role's `B`.",
        table(["trained", *whats], rows(among)),
        "The same between what a role leaves alone and what it would read where every token was written once, by the "
        "role that spoke (`base_lr_shared`).",
        table(["trained", *whats], rows(own)),
    ]
    for name, title, some in (
        ("similarity.png", "between roles", among),
        ("similarity-shared.png", "between a role alone and the shared cache", own),
    ):
        panels = {what: {label: _by_layer(_of(some, label=label, what=what)) for label in labels} for what in whats}
        parts.append(_picture(panels, pictures / name, f"Cosine {title}, layer by layer", x="layer", y="cosine"))
    return parts


def _by_layer(records: Sequence[Record]) -> list[tuple[float, float]]:
    layers = sorted({record["layer"] for record in records})
    return [(layer, _mean(_of(records, layer=layer), "cosine", "tokens")) for layer in layers]


def _lowest(records: Sequence[Record]) -> str:
    if not records:
        return "-"
    return f"{_mean(records, 'cosine', 'tokens'):.3f} ({min(cosine for _, cosine in _by_layer(records)):.3f})"


# -- next tokens ---------------------------------------------------------------------------------------------------


def _divergence(records: Sequence[Record], pictures: Path) -> list[str]:
    labels, modes = _labels(records), [mode.value for mode in COMPARED]
    whole = [record for record in records if record["role"] == "all" and record["step"] is None]
    by_role = [record for record in records if record["role"] != "all"]
    roles = list(dict.fromkeys(record["role"] for record in by_role))

    def rows(cells: Callable[[str, str], list[str]]) -> list[list[str]]:
        return [[label, f"`{mode}`", *cells(label, mode)] for label in labels for mode in modes]

    def overall(label: str, mode: str) -> list[str]:
        some = _of(whole, label=label, mode=mode)
        return [
            _with_interval(some),
            f"{_mean(some, 'median', 'targets'):.2g}",
            f"{_mean(some, 'p99', 'targets'):.2g}",
            f"{100 * _mean(some, 'changed', 'targets'):.2f}",
        ]

    def of_roles(label: str, mode: str) -> list[str]:
        cells = [_of(by_role, label=label, mode=mode, role=role) for role in roles]
        return [_with_interval(some) if some else "-" for some in cells]

    panels = {label: {mode: _by_step(_of(records, label=label, mode=mode)) for mode in modes} for label in labels}
    return [
        "### What sharing does to the next token",
        "KL divergence of the next token's distribution from that of `non_shared`, in nats, over every token that a "
        "role authored. In brackets: 95% of the mean, by drawing trajectories anew (of several runs of a label: the "
        "lowest and the highest mean). It tells how far a mode is from the same roles in `non_shared`, not which of "
        "both is right: roles that learnt from shared caches alone, as by `shared`, are at home in these.",
        table(["trained", "mode", "mean KL", "median", "99th percentile", "likeliest token changed, %"], rows(overall)),
        "By the role that speaks.",
        table(["trained", "mode", *roles], rows(of_roles)),
        _picture(
            panels, pictures / "divergence.png", "Mean KL by step", x="step (turn of any role)", y="KL, nats", log=True
        ),
    ]


def _by_step(records: Sequence[Record]) -> list[tuple[float, float]]:
    stepped = [record for record in records if record["step"] is not None]
    most = max((record["trajectories"] for record in stepped), default=0)
    steps = sorted({record["step"] for record in stepped if record["trajectories"] >= LEAST_SHARE * most})
    return [(step, _mean(_of(stepped, step=step), "kl", "targets")) for step in steps]


def _with_interval(records: Sequence[Record]) -> str:
    runs = [record["kl"] for record in records]
    interval = records[0]["interval"] if len(runs) == 1 else [min(runs), max(runs)]
    mean = f"{_mean(records, 'kl', 'targets'):.3g}"
    return mean if interval is None else f"{mean} ({interval[0]:.3g} to {interval[1]:.3g})"


# -- both ----------------------------------------------------------------------------------------------------------


def _labels(records: Iterable[Record]) -> list[str]:
    """In the order in which they come."""
    return list(dict.fromkeys(record["label"] for record in records))


def _of(records: Sequence[Record], **fields: Any) -> list[Record]:
    return [record for record in records if all(record[name] == value for name, value in fields.items())]


def _mean(records: Sequence[Record], figure: str, weight: str) -> float:
    total = sum(record[weight] for record in records)
    return sum(record[figure] * record[weight] for record in records) / total


def _picture(panels: Mapping[str, Curves], path: Path, words: str, **axes: Any) -> str:
    """Draws what has points, and gives the link; "" where nothing has: a team of one has no pairs."""
    kept = {title: {name: points for name, points in curves.items() if points} for title, curves in panels.items()}
    kept = {title: curves for title, curves in kept.items() if curves}
    if not kept:
        return ""
    draw(kept, path, **axes)
    return image(words, path)
