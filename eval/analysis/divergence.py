"""How far the next token's distribution moves when roles share a cache: KL(non_shared ‖ mode), in nats.

Along given trajectories, at every token that a role authored. Zero means that sharing changes nothing there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from lragent.eval.analysis.forced import Forced, turns_of
from lragent.eval.analysis.streams import target_positions
from lragent.modes import PrefixWriter, SharingMode
from lragent.train.data import Example

COMPARED = tuple(mode for mode in SharingMode if mode is not SharingMode.NON_SHARED)
DRAWS = 2_000
"""Of trajectories, for an interval."""


@dataclass(frozen=True, eq=False)
class Divergence:
    """One trajectory's n targets in one mode. All [n], on the CPU."""

    kl: Tensor
    """float32, nats"""
    changed: Tensor
    """bool: whether the likeliest token is another one."""
    roles: Tensor
    """long: who authored the target."""
    turns: Tensor
    """long: in which turn, counted from 0."""


def examples_by_mode(
    load: Callable[[PrefixWriter], Sequence[Example]], prefix_writer: PrefixWriter
) -> dict[SharingMode, Sequence[Example]]:
    """The same trajectories as each mode serves them: `base` writes prefixes only where a token has one writer.

    load: the examples with the given prefix writer. prefix_writer: the pack's.
    """
    loaded = {writer: load(writer) for writer in {prefix_writer, PrefixWriter.FIRST}}
    return {mode: loaded[prefix_writer if mode.one_writer_per_token else PrefixWriter.FIRST] for mode in SharingMode}


def divergences(
    forced: Forced, examples: Mapping[SharingMode, Sequence[Example]]
) -> Iterator[dict[SharingMode, Divergence]]:
    """For each trajectory: how far each mode is from `non_shared`. examples: the same trajectories for every mode."""
    exact = forced.logprobs(examples[SharingMode.NON_SHARED], SharingMode.NON_SHARED)
    others = [forced.logprobs(examples[mode], mode) for mode in COMPARED]
    for example, wanted, *got in zip(examples[SharingMode.NON_SHARED], exact, *others, strict=True):
        roles, turns = example.loss_roles[target_positions(example)], turns_of(example)
        yield {
            mode: Divergence(
                kl=_kl(wanted, one).cpu(),
                changed=(wanted.argmax(-1) != one.argmax(-1)).cpu(),
                roles=roles,
                turns=turns,
            )
            for mode, one in zip(COMPARED, got, strict=True)
        }


def _kl(exact: Tensor, other: Tensor) -> Tensor:
    """KL(exact ‖ other) of log-probabilities [n, vocabulary]. Returns [n]; what rounding makes negative is 0."""
    return (exact.exp() * (exact - other)).sum(-1).clamp(min=0)


def records(
    found: Sequence[Mapping[SharingMode, Divergence]], names: Sequence[str], label: str
) -> list[dict[str, Any]]:
    """Per mode: over all targets, by role and by step (turn), ready for JSON. names: `Forced.names`.

    `interval` holds 95% of the mean, by drawing trajectories anew (None where there is only one); `changed` is the
    share of targets whose likeliest token is another one.
    """
    made = []
    for mode in COMPARED:
        parts = [one[mode] for one in found]
        kl, changed, roles, turns = (
            np.concatenate([getattr(part, field).numpy() for part in parts])
            for field in ("kl", "changed", "roles", "turns")
        )
        of = np.repeat(np.arange(len(parts)), [len(part.kl) for part in parts])
        chosen: list[tuple[str, int | None, np.ndarray]] = [("all", None, np.ones(len(kl), dtype=bool))]
        chosen += [(names[role], None, roles == role) for role in np.unique(roles)]
        chosen += [("all", int(turn), turns == turn) for turn in np.unique(turns)]
        for role, step, own in chosen:
            made.append(
                {"kind": "divergence", "label": label, "mode": mode.value, "role": role, "step": step}
                | _summary(kl[own].astype(np.float64), changed[own], of[own])
            )
    return made


def _summary(kl: np.ndarray, changed: np.ndarray, of: np.ndarray) -> dict[str, Any]:
    """Mean, median and tail of some targets; `of` says whose trajectory each is."""
    return {
        "kl": float(kl.mean()),
        "interval": _interval(kl, of),
        "median": float(np.median(kl)),
        "p99": float(np.quantile(kl, 0.99)),
        "changed": float(changed.mean()),
        "targets": len(kl),
        "trajectories": len(np.unique(of)),
    }


def _interval(values: np.ndarray, of: np.ndarray) -> list[float] | None:
    """95% of the mean, where trajectories, not targets, are drawn: targets of one trajectory are alike."""
    _, member = np.unique(of, return_inverse=True)
    counts = np.bincount(member)
    if len(counts) < 2:
        return None
    sums = np.bincount(member, weights=values)
    drawn = np.random.default_rng(0).multinomial(len(counts), np.full(len(counts), 1 / len(counts)), size=DRAWS)
    low, high = np.quantile((drawn @ sums) / (drawn @ counts), (0.025, 0.975))
    return [float(low), float(high)]
