"""A step's pieces laid end to end, as the host knows them: what the model and every attention pass are given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lragent.modes import SharingMode
from lragent.serve.cache.slots import Slots
from lragent.serve.engine.sequence import Piece

Ints = npt.NDArray[np.integer]


@dataclass(frozen=True)
class Part:
    """One piece's place in a step.

    start, end: its rows of the flat batch. context: how many positions its sequence has up to its last token.
    first_new: the row from which on its base cache is written; it exists for those before. base_slots, low_slots:
    [context], where the whole context lies.
    """

    start: int
    end: int
    context: int
    first_new: int
    base_slots: Slots
    low_slots: Slots


@dataclass(frozen=True)
class Step:
    """The flat batch of one step, T tokens.

    tokens, positions: [T]. roles: of length T, who processes each token. keep: rows whose logits are wanted.
    low_apart: whether LR caches lie in slots of their own, rather than each beside its base cache.
    """

    parts: tuple[Part, ...]
    tokens: Ints
    positions: Ints
    roles: list[int]
    keep: list[int]
    low_apart: bool

    @classmethod
    def of(cls, pieces: list[Piece], mode: SharingMode, role_of: Mapping[int, int]) -> Step:
        """Lay `pieces` end to end. role_of: role index by writer tag."""
        low_apart = mode is SharingMode.BASE_SHARED
        parts: list[Part] = []
        roles: list[int] = []
        keep: list[int] = []
        for piece in pieces:
            lease, at = piece.sequence.held, len(roles)
            if low_apart:  # an LR prefill processes others' tokens as the reader
                roles += [piece.sequence.role.index] * (piece.end - piece.start)
            else:
                roles += [role_of[tag] for tag in lease.tags[piece.start : piece.end].tolist()]
            parts.append(
                Part(
                    at,
                    len(roles),
                    piece.end,
                    min(at + max(0, lease.base_reused - piece.start), len(roles)),
                    lease.base_slots[: piece.end],
                    (lease.lr_slots if low_apart else lease.base_slots)[: piece.end],
                )
            )
            if piece.yields_token:
                keep.append(len(roles) - 1)
        tokens = np.concatenate([piece.sequence.held.tokens[piece.start : piece.end] for piece in pieces])
        positions = np.concatenate([np.arange(piece.start, piece.end) for piece in pieces])
        return cls(tuple(parts), tokens, positions, roles, keep, low_apart)
