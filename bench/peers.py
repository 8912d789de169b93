"""What users have today: vLLM's figures on the same trace, and what is to be made of them.

Measured on one H100 with vLLM 0.22 (FlashAttention 3, CUDA graphs, torch.compile, prefix caching, LoRA of rank 8 on q
and v, Llama-3.1-8B with dummy weights), medians of 3. With one adapter every step uses the same, so that its prefix
cache serves all steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lragent.bench.roofline import Ceilings, ModelSize, Roofline
from lragent.bench.traces import paper_trace, team, team_trace, trace_tokens
from lragent.modes import SharingMode

NAME = "vLLM 0.22"
SHAPE = "llama-3.1-8b"
"""The shape that its figures are of."""
CEILINGS = Ceilings(copy=3.0e12, products=790e12)
"""Measured on its machine in the same hour."""


@dataclass(frozen=True)
class PeerRow:
    """adapters: that took turns in the trajectory. tokens_s, ttft_sum_s: as in lragent.bench.summary."""

    context: int
    concurrent: int
    adapters: int
    tokens_s: float
    ttft_sum_s: float | None = None


ROWS = (
    PeerRow(256, 1, 3, 803, 0.51),
    PeerRow(256, 1, 1, 853, 0.39),
    PeerRow(1024, 1, 3, 1725, 1.01),
    PeerRow(1024, 1, 1, 2034, 0.58),
    PeerRow(4096, 1, 3, 4282, 2.03),
    PeerRow(4096, 1, 1, 5689, 1.03),
    PeerRow(16_384, 1, 3, 4883, 11.28),
    PeerRow(16_384, 1, 1, 10_100, 4.23),
    PeerRow(1024, 16, 3, 8148),
    PeerRow(1024, 16, 1, 14_509),
    PeerRow(4096, 8, 3, 8273),
    PeerRow(4096, 8, 1, 16_570),
    PeerRow(4096, 1, 8, 2694, 4.40),
)

WANTED = {(256, 1): 1.1, (1024, 1): 1.1, (4096, 1): 1.1, (16_384, 1): 1.0, (1024, 16): 1.1, (4096, 8): 1.05}
"""By context and concurrency: the factor over its throughput with one adapter that three roles are to reach here."""


@dataclass(frozen=True)
class Comparison:
    """Ours beside theirs.

    factor: ours over theirs. even_factor: ours over what theirs would be on a machine with our ceilings, taking it to
    keep its share of the floor: theirs, times the time that the trace takes at least at its ceilings, over the same at
    ours. So a run on a slower card, or in a slower hour, is not held to a faster one's figures, nor the other way
    round; memory and products count as much as the trace needs of each. wanted: what the even factor should be.
    """

    context: int
    concurrent: int
    tokens: int
    roles: int
    adapters: int
    ours: float
    theirs: float
    factor: float
    even_factor: float
    wanted: float | None
    ttft_sum_s: float | None
    their_ttft_sum_s: float | None

    @property
    def reached(self) -> bool | None:
        """None where nothing is wanted."""
        return None if self.wanted is None else self.even_factor >= self.wanted


def compare(rows: Sequence[dict[str, Any]], size: ModelSize, ceilings: Ceilings) -> list[Comparison]:
    """Each of our rows in `base_lr_shared` beside theirs of the same trace and load, by as many adapters and by one."""
    found = []
    for ours in rows:
        if ours["mode"] != SharingMode.BASE_LR_SHARED or ours["rate"] or not ours["tokens_s"]:
            continue
        if ours["trajectories"] != ours["concurrent"]:
            continue
        for theirs in ROWS:
            same = (theirs.context, theirs.concurrent) == (ours["context"], ours["concurrent"])
            if not same or theirs.adapters not in (1, ours["roles"]) or ours["tokens"] != _tokens(theirs.context):
                continue
            if theirs.adapters == 1 and ours["roles"] != 3:
                continue
            factor = ours["tokens_s"] / theirs.tokens_s
            there, here = (_floor_s(size, machine, theirs) for machine in (CEILINGS, ceilings))
            wanted = WANTED.get((theirs.context, theirs.concurrent)) if theirs.adapters == 1 else None
            comparison = Comparison(
                theirs.context, theirs.concurrent, ours["tokens"], ours["roles"], theirs.adapters, ours["tokens_s"],
                theirs.tokens_s, round(factor, 3), round(factor * here / there, 3), wanted, ours["ttft_sum_s"],
                theirs.ttft_sum_s,
            )  # fmt: skip
            found.append(comparison)
    return found


def as_rows(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """To be saved."""
    return [{**asdict(one), "reached": one.reached} for one in comparisons]


def _tokens(context: int) -> int:
    return trace_tokens(paper_trace(context))


def _floor_s(size: ModelSize, ceilings: Ceilings, peer: PeerRow) -> float:
    """With one adapter it computes what a shared cache would, with several what `non_shared` must."""
    mode = SharingMode.FULL_SHARED if peer.adapters == 1 else SharingMode.NON_SHARED
    trace = team_trace(peer.context, team(max(3, peer.adapters)))
    return Roofline(size, ceilings).trace(trace, mode, peer.concurrent, peer.concurrent).total_s
