"""A step's pieces laid end to end, as numbers: what the model and every attention pass are given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lragent.modes import SharingMode
from lragent.serve.engine.sequence import Piece

Ints = npt.NDArray[np.int32]

SHORT = 16
"""Pieces of at most so many tokens are attended to apart from longer ones, where a step has both."""


@dataclass(frozen=True)
class Step:
    """The flat batch of one step: T tokens in S pieces, of which n yield a token.

    pieces: long ones before short ones, and of the long ones those first that write no base cache (LR prefills), or not
    at once. yielding: those that yield a token, in order. tokens: [T]; one that the step before draws, and so is not
    known yet, is given as -1 - row of its sequence. positions, roles: [T], who processes each token. base_slots,
    low_slots: [T], where its base and LR cache are written, -1 where they are not. query_start: [S + 1], where each
    piece begins. context: [S], positions of its sequence up to its last token. rows: [S], its sequence's row. keep:
    [n], which tokens' logits are wanted, and drawn_rows: [n], the rows of their sequences. base_from: the tokens before
    it write no base cache. short_from: the first of the short pieces. low_apart: whether LR caches lie in slots of
    their own, rather than each beside its base cache.
    """

    pieces: tuple[Piece, ...]
    yielding: tuple[Piece, ...]
    tokens: Ints
    positions: Ints
    roles: Ints
    base_slots: Ints
    low_slots: Ints
    query_start: Ints
    context: Ints
    rows: Ints
    keep: Ints
    drawn_rows: Ints
    base_from: int
    short_from: int
    low_apart: bool

    @property
    def most_new(self) -> int:
        """Tokens of the longest piece."""
        return max(piece.end - piece.start for piece in self.pieces)

    @classmethod
    def of(cls, pieces: list[Piece], mode: SharingMode, role_of: Mapping[int, int]) -> Step:
        """Lay `pieces` end to end. role_of: role index by writer tag."""
        low_apart = mode is SharingMode.BASE_SHARED
        if len(pieces) > 1:
            pieces = sorted(pieces, key=_order)
        total, short_from, base_from = sum(piece.end - piece.start for piece in pieces), 0, 0
        tokens, positions, roles, base_slots, low_slots = np.empty((5, total), np.int32)
        starts, keep, leading = [0], [], True
        for index, piece in enumerate(pieces):
            sequence, lease = piece.sequence, piece.sequence.held
            start, end, at = piece.start, piece.end, starts[-1]
            new = slice(at, at + end - start)
            tokens[new] = lease.tokens[start:end]
            if end == lease.length and sequence.in_flight:
                tokens[new.stop - 1] = -1 - sequence.row
            positions[new] = range(start, end) if end - start <= SHORT else np.arange(start, end)
            roles[new] = _roles(piece, low_apart, role_of)
            base_slots[new] = lease.base_slots[start:end]
            if start < lease.base_reused:
                base_slots[at : at + lease.base_reused - start] = -1
            low_slots[new] = lease.lr_slots[start:end] if low_apart else base_slots[new]
            starts.append(new.stop)
            if piece.yields_token:
                keep.append(new.stop - 1)
            if leading:
                base_from = at + min(max(0, lease.base_reused - start), end - start)
                leading = base_from == new.stop
            if end - start > SHORT:
                short_from = index + 1
        return cls(
            tuple(pieces),
            tuple(piece for piece in pieces if piece.yields_token),
            tokens,
            positions,
            roles,
            base_slots,
            low_slots,
            np.array(starts, np.int32),
            np.array([piece.end for piece in pieces], np.int32),
            np.array([piece.sequence.row for piece in pieces], np.int32),
            np.array(keep, np.int32),
            np.array([piece.sequence.row for piece in pieces if piece.yields_token], np.int32),
            base_from,
            short_from,
            low_apart,
        )


def _order(piece: Piece) -> int:
    if piece.end - piece.start <= SHORT:
        return 3
    reused = piece.sequence.held.base_reused
    return 0 if piece.end <= reused else 1 if piece.start < reused else 2


def _roles(piece: Piece, low_apart: bool, role_of: Mapping[int, int]) -> int | list[int] | Ints:
    if low_apart:  # an LR prefill processes others' tokens as the reader
        return piece.sequence.role.index
    tags = piece.sequence.held.tags[piece.start : piece.end]
    if len(tags) <= SHORT:
        return [role_of[tag] for tag in tags.tolist()]
    known, which = np.unique(tags, return_inverse=True)
    return np.array([role_of[tag] for tag in known.tolist()], np.int32)[which]
