"""What the next step processes: first come, first served, all running sequences in every step."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from lragent.serve.cache.role_cache import OutOfSlotsError, RoleCache
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

    def schedule(self) -> list[Piece]:
        """The pieces of the next step, each with its slots reserved; empty if there is nothing to do."""
        while self.waiting and len(self.running) < self.max_sequences:
            self._admit(self.waiting.popleft())
        pieces: list[Piece] = []
        budget = self.token_budget
        for sequence in sorted(self.running, key=lambda s: s.held.length - s.computed > 1):  # decoding first, stable
            if sequence not in self.running:
                continue  # preempted for one before it
            if budget == 0:
                break
            end = min(sequence.held.length, sequence.computed + budget)
            if not self._reserve(sequence, end, pieces):
                continue
            pieces.append(Piece(sequence, sequence.computed, end))
            budget -= end - sequence.computed
        return pieces

    def _admit(self, sequence: Sequence) -> None:
        prompt = sequence.request.prompt
        tokens = np.array([*prompt.token_ids, *sequence.generated], dtype=np.int64)
        own = [sequence.role.reader.writer] * len(sequence.generated)
        lease = self.cache.open(
            tokens,
            np.array([*sequence.tags, *own], dtype=np.int64),
            opening=prompt.opening + len(sequence.generated),
            reader=sequence.role.reader,
            salt=sequence.request.salt,
            capacity=sequence.capacity,
        )
        sequence.lease = lease
        sequence.computed = lease.lr_reused if self.cache.own_residuals else lease.base_reused
        if sequence.usage_at_start is None:
            size = len(prompt.token_ids)
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
        while True:
            try:
                self.cache.reserve(sequence.held, end)
                return True
            except OutOfSlotsError:
                victim = next(s for s in reversed(self.running) if id(s) not in taken)
                self._preempt(victim)
                if victim is sequence:
                    return False

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        self.waiting.appendleft(sequence)
        self.preempted += 1

    def _release(self, sequence: Sequence) -> None:
        self.cache.close(sequence.held, sequence.computed)
        sequence.lease = None
