"""What the next step processes, and who runs."""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, field

from lragent.serve.cache.role_cache import RoleCache
from lragent.serve.engine.sequence import Piece, Sequence
from lragent.serve.engine.types import Usage
from lragent.serve.engine.waiting import WaitingLine

ASIDE = 16
"""Steps after which one who stands aside looks again."""


@dataclass
class Scheduler:
    """Keeps the waiting and the running sequences.

    Each step takes every running sequence that decodes, then prefills up to `token_budget` tokens. The rule, for
    prefills as for who may run next: fewest tokens left to compute go first, each step that has passed a sequence over
    counting as `token_budget` tokens fewer. So an agent's next step is not stuck behind a long new prompt, and the long
    prompt has its turn after as many steps as it would take alone.

    Where slots run out, the sequence that was admitted last is preempted: what it computed stays cached as long as
    there is room, and it resumes, before all who wait, with its generated tokens as part of its context.

    Prompts are handed to the trees chunk by chunk. One that a running sequence is about to compute a prefix of, longer
    by `least_gain` tokens than what is cached, is held back until that prefix is there: others pass it meanwhile.

    Where the cache is full, a prompt of which little is cached stands aside while it would take the slots of entries
    that others have found lately, such as agents between two of their steps: else all would compute again what they
    have just lost to one another. It waits `patience` steps at most, and not where nobody runs.

    Not more than one token of a sequence may be in flight when `schedule` is called.
    check: check the integrity of everything before each step (slow, for debugging).
    """

    cache: RoleCache
    max_sequences: int
    token_budget: int
    least_gain: int = 8
    patience: int = 256
    check: bool = False
    running: list[Sequence] = field(default_factory=list)
    """In the order in which they were admitted."""
    preempted: int = 0
    held_back: int = 0
    """How many times a sequence was held back, up to now."""
    stood_aside: int = 0
    """How many times one stood aside."""
    _line: WaitingLine = field(default_factory=WaitingLine)
    _arrived: list[Sequence] = field(default_factory=list)
    """Added since the last step; they have no place in the line yet."""
    _steps: int = 0
    _times: deque[int] = field(default_factory=deque)
    """The cache's times at the last `patience` steps."""
    _full: Sequence | None = None
    """It has found no room, and nothing has changed since."""

    def __post_init__(self) -> None:
        self._rows = list(range(self.max_sequences))  # a heap: the free ones

    @property
    def waiting(self) -> list[Sequence]:
        """Everybody who waits, in the order in which they would run; then who is held back, then who has just come."""
        return [*self._line.everybody(), *self._arrived]

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self._arrived.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is; what it computed stays cached."""
        if sequence.lease is not None:
            self.running.remove(sequence)
            self._release(sequence)
        elif sequence in self._arrived:
            self._arrived.remove(sequence)
        else:
            self._line.remove(sequence)

    def schedule(self) -> list[Piece]:
        """The pieces of the next step, each with its slots reserved; empty if there is nothing to do, or all that runs
        and all that could run waits for a token in flight."""
        if self.check:
            self.check_integrity()
        self._admit_all()
        pieces = self._pieces()
        if not pieces and not self.running:  # the only one was preempted to clear the cache, see _reserve
            self._admit_all()
            pieces = self._pieces()
        if pieces:
            self._steps += 1
            self._times.append(self.cache.now)
            if len(self._times) > self.patience:
                self._times.popleft()
            for piece in pieces:
                piece.sequence.served = self._steps
        return pieces

    def advanced(self, piece: Piece) -> None:
        """A step with this piece was launched. Hands in what that computes of the prompt: the device does steps in
        order, so a later step may read it. Call it for all pieces of a step before the next `schedule`."""
        sequence, lease = piece.sequence, piece.sequence.held
        sequence.computed = piece.end
        length = min(sequence.keepable, lease.prompt)
        if length > self.cache.handed_in(lease):
            self.cache.commit(lease, length)
            self._line.progressed(sequence, length)

    def check_integrity(self) -> None:
        """Raises AssertionError if a sequence, a row or a slot is lost or taken twice."""
        self.cache.check_integrity()
        self._line.check_integrity(self.running)
        rows = [sequence.row for sequence in self.running]
        assert sorted([*rows, *self._rows]) == list(range(self.max_sequences)), "a row is lost or taken twice"
        for sequence in self.running:
            lease = sequence.held
            assert sequence.computed <= lease.length, "more is computed than there is"
            assert (
                min(lease.reserved, lease.lr_reserved if lease.lr_slots.size else lease.reserved) >= sequence.computed
            )
        assert all(sequence.lease is None and sequence.row < 0 for sequence in self.waiting), (
            "one who waits has a lease"
        )

    def _pieces(self) -> list[Piece]:
        pieces: list[Piece] = []
        budget = self.token_budget
        for sequence in self._in_order():
            if budget == 0:
                break
            lease = sequence.lease
            if lease is None:
                continue  # preempted for one before it
            preempted = self.preempted
            end = min(lease.length, sequence.computed + budget)
            if self._reserve(sequence, end, pieces):
                pieces.append(Piece(sequence, sequence.computed, end))
                budget -= end - sequence.computed
            if self.preempted > preempted:  # perhaps out of this step
                budget = self.token_budget - sum(piece.end - piece.start for piece in pieces)
        return pieces

    def _in_order(self) -> list[Sequence]:
        """Who has something to compute: who decodes, then who prefills, by the rule."""
        decoding: list[Sequence] = []
        prefilling: list[tuple[int, Sequence]] = []
        for sequence in self.running:
            left = sequence.held.length - sequence.computed
            if left == 1:
                decoding.append(sequence)
            elif left > 1:
                prefilling.append((self._key(left, sequence.served), sequence))
        prefilling.sort(key=lambda pair: pair[0])
        return [*decoding, *(sequence for _, sequence in prefilling)]

    def _key(self, left: int, since: int) -> int:
        """`left - token_budget * (now - since)`, less what all have in common: so it never changes while one waits."""
        return left + self.token_budget * since

    def _admit_all(self) -> None:
        """Let run who may, in order."""
        competing = len(self._arrived) + len(self._line) > self.max_sequences - len(self.running)
        for sequence in self._arrived:
            sequence.came = sequence.served = self._steps
            self._line.add(sequence, self._key(self._left(sequence) if competing else 0, self._steps))
        self._arrived.clear()
        self._line.call_back(self._steps if self.running else None)
        while len(self.running) < self.max_sequences:
            head = self._line.head()
            if head is None or head is self._full or head.in_flight:
                break  # whoever was preempted with a token in flight is not passed by those who came later
            self._admit(head)

    def _left(self, sequence: Sequence) -> int:
        prompt = sequence.request.prompt
        tokens, _ = sequence.context()
        found = self.cache.measure(
            tokens, opening=prompt.opening, reader=sequence.role.reader, salt=sequence.request.salt
        )
        return len(tokens) - found

    def _admit(self, sequence: Sequence) -> None:
        """Let the head of the line run, if nobody computes its prompt just now, and if there is room for what is known
        of it and of all who run: else somebody would only be preempted."""
        if self._stands_aside(sequence):
            self._line.stand_head_aside(self._steps + ASIDE)
            self.stood_aside += 1
            return
        prompt = sequence.request.prompt
        tokens, tags = sequence.context()
        opening = prompt.opening + len(sequence.generated)
        lease = self.cache.open(
            tokens,
            tags,
            opening=opening,
            reader=sequence.role.reader,
            salt=sequence.request.salt,
            capacity=sequence.capacity,
        )
        for runner in self.running:
            until = self.cache.promised(lease, opening, runner.held, self.least_gain)
            if until:
                self.cache.close(lease, 0)
                self._line.hold_head_back(runner, until)
                self.held_back += 1
                return
        computed = lease.lr_reused if self.cache.own_residuals else lease.base_reused
        if self.running and not self.cache.fits(lease, lease.length, [each.held for each in self.running]):
            self.cache.close(lease, 0)
            self._line.put_head_at(self._key(lease.length - computed, sequence.served))
            self._full = sequence
            return
        self._line.pop()
        sequence.lease = lease
        sequence.computed = computed
        sequence.row = heapq.heappop(self._rows)
        sequence.served = self._steps
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

    def _stands_aside(self, sequence: Sequence) -> bool:
        """Whether the head of the line waits, lest it take what others are about to use."""
        size = len(sequence.request.prompt.ids)
        overdue = self._steps - sequence.came >= self.patience
        if not self.running or overdue or size <= self.cache.base_pool.free_count or self._line.head_was_preempted:
            return False
        left = self._left(sequence)
        if left <= size - left:  # most of it is cached: it is one of those who come back
            return False
        since = self._times[0] if len(self._times) == self.patience else 1  # at 0 is what nobody has found
        return self.cache.displaces(left, [each.held for each in self.running], since)

    def _reserve(self, sequence: Sequence, end: int, pieces: list[Piece]) -> bool:
        """Slots for `sequence` up to `end`, preempting from the last on, out of this step if need be; False if it was
        preempted itself."""
        while not self.cache.fits(sequence.held, end):
            victim = self.running[-1]
            pieces[:] = [piece for piece in pieces if piece.sequence is not victim]
            self._preempt(victim)
            if victim is sequence:
                if not self.running:  # what it holds lies in too many half-empty pages: it begins anew in whole ones
                    self.cache.clear()
                return False
        self.cache.reserve(sequence.held, end)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        self._line.add_in_front(sequence)
        self.preempted += 1

    def _release(self, sequence: Sequence) -> None:
        self.cache.close(sequence.held, sequence.keepable)
        sequence.lease, sequence.held_since = None, None
        heapq.heappush(self._rows, sequence.row)
        sequence.row = -1
        self._line.gone(sequence)
        self._full = None
