"""What the next step processes: first come, first served, all running sequences in every step."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from lragent.serve.cache.role_cache import RoleCache
from lragent.serve.engine.sequence import Piece, Sequence
from lragent.serve.engine.types import Usage


@dataclass
class Scheduler:
    """Keeps the waiting and the running sequences.

    Each step takes every running sequence that decodes, then prefills in order of arrival up to `token_budget` tokens.
    Where slots run out, the sequence that came last is preempted: what it computed stays cached as long as there is
    room, and it resumes with its generated tokens as part of its context.
    """

    cache: RoleCache
    max_sequences: int
    token_budget: int
    waiting: deque[Sequence] = field(default_factory=deque)
    running: list[Sequence] = field(default_factory=list)
    preempted: int = 0
    _full: bool = False
    """The first that waits has found no room, and nothing has changed since."""

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is; what it computed stays cached."""
        if sequence in self.running:
            self.running.remove(sequence)
            self._release(sequence)
        else:
            self.waiting.remove(sequence)
            self._full = False

    def schedule(self) -> list[Piece]:
        """The pieces of the next step, each with its slots reserved; empty if there is nothing to do."""
        while self.waiting and len(self.running) < self.max_sequences and not self._full:
            if self.waiting[0].in_flight:
                break
            self._admit()
        pieces: list[Piece] = []
        budget = self.token_budget
        for sequence in sorted(self.running, key=lambda s: s.held.length - s.computed > 1):  # decoding first, stable
            if sequence not in self.running:
                continue  # preempted for one before it
            if budget == 0:
                break
            if sequence.computed == sequence.held.length:
                continue
            end = min(sequence.held.length, sequence.computed + budget)
            if not self._reserve(sequence, end, pieces):
                continue
            pieces.append(Piece(sequence, sequence.computed, end))
            budget -= end - sequence.computed
        return pieces

    def advanced(self, piece: Piece) -> None:
        """A piece was given to the device."""
        sequence = piece.sequence
        sequence.computed = piece.end
        if piece.end == len(sequence.request.prompt.ids):  # it is complete: others may use it from now on
            self.cache.commit(sequence.held, piece.end)

    def _admit(self) -> None:
        """Let the first that waits run, if there is room for what is known of it: else it would only be preempted."""
        sequence = self.waiting[0]
        prompt = sequence.request.prompt
        tokens = np.concatenate([prompt.ids, np.array(sequence.generated, np.int64)])
        own = np.full(len(sequence.generated), sequence.role.reader.writer, np.int64)
        lease = self.cache.open(
            tokens,
            np.concatenate([sequence.tags, own]),
            opening=prompt.opening + len(sequence.generated),
            reader=sequence.role.reader,
            salt=sequence.request.salt,
            capacity=sequence.capacity,
        )
        if self.running and not self.cache.fits(lease, lease.length):
            self.cache.close(lease, 0)
            self._full = True
            return
        self.waiting.popleft()
        sequence.lease = lease
        taken = {other.row for other in self.running}
        sequence.row = next(row for row in range(self.max_sequences) if row not in taken)
        sequence.computed = lease.lr_reused if self.cache.own_residuals else lease.base_reused
        if sequence.usage_at_start is None:
            size = len(prompt.ids)
            sequence.usage_at_start = Usage(
                prompt_tokens=size,
                completion_tokens=0,
                tokens_computed=size - sequence.computed,
                base_reused=lease.base_reused,
                lr_reused=lease.lr_reused,
                lr_prefilled=lease.base_reused - sequence.computed,
            )
        self.running.append(sequence)

    def _reserve(self, sequence: Sequence, end: int, pieces: list[Piece]) -> bool:
        """Slots for `sequence` up to `end`, preempting from the last on; False if it was preempted itself.

        A sequence that is in this step already is not preempted.
        """
        taken = {id(piece.sequence) for piece in pieces}
        while not self.cache.fits(sequence.held, end):
            victim = next(s for s in reversed(self.running) if id(s) not in taken)
            self._preempt(victim)
            if victim is sequence:
                return False
        self.cache.reserve(sequence.held, end)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        self.waiting.appendleft(sequence)
        self.preempted += 1

    def _release(self, sequence: Sequence) -> None:
        self.cache.close(sequence.held, sequence.settled)
        sequence.lease, sequence.row = None, -1
        self._full = False
