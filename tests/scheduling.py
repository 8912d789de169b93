"""An engine's loop with the model left out, on a real scheduler and cache.

The token after position n is a function of what is before it, and a step writes into each slot what a forward pass
would have put there: a digest of all that the entry depends on. So a wrong slot, a stale entry or a wrong token in a
tree shows as a wrong digest when it is read. Steps may overlap: then a step is launched before the tokens of the step
before are known to the host, as the engine does on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from tiny import tiny_tokenizer

from lragent.modes import SharingMode
from lragent.serve.cache.lease import Lease
from lragent.serve.cache.role_cache import Reader, RoleCache
from lragent.serve.engine.detokenizer import Detokenizer
from lragent.serve.engine.roles import EngineRole
from lragent.serve.engine.scheduler import Scheduler
from lragent.serve.engine.sequence import Piece, Sequence
from lragent.serve.engine.types import GenerationRequest, Prompt, SamplingParams

ROLES = [EngineRole(name, i + 1, Reader(f"{name}'s", 101 + i)) for i, name in enumerate(("plan", "action", "reflect"))]
WRITERS = [role.reader.writer for role in ROLES]
TOKENIZER = tiny_tokenizer()


@dataclass
class Device:
    """What lies in every slot, and every running sequence's tokens as they are drawn, known to the host or not."""

    cache: RoleCache
    base: dict[int, int] = field(default_factory=dict)
    low: dict[int, int] = field(default_factory=dict)
    tokens: dict[Sequence, list[int]] = field(default_factory=dict)

    def run(self, piece: Piece) -> None:
        """Write what is new, then read the whole context."""
        sequence, lease = piece.sequence, piece.sequence.held
        at = hash(self.cache.base_namespace(lease.reader, lease.salt))
        for n, (token, tag) in enumerate(zip(self.tokens[sequence], lease.tags.tolist(), strict=False)):
            if n == piece.end:
                break
            at = hash((at, token, tag))
            slot = int(lease.base_slots[n])
            if n >= max(piece.start, lease.base_reused):
                self.base[slot] = at
            assert self.base[slot] == at, f"another's base entry, or a stale one, at position {n}"
            if self.cache.own_residuals:
                slot, low = int(lease.lr_slots[n]), hash((at, lease.reader.digest))
                if n >= piece.start:
                    self.low[slot] = low
                assert self.low[slot] == low, f"another's LR entry, or a stale one, at position {n}"


@dataclass
class Harness:
    """overlap: launch a step before the tokens of the one before are known. per: LR entries in a page."""

    mode: SharingMode = SharingMode.BASE_LR_SHARED
    slots: int = 100
    max_sequences: int = 4
    token_budget: int = 8
    growth: int = 1
    per: int = 4
    overlap: bool = False
    count: int = 0
    finished: list[Sequence] = field(default_factory=list)
    cancelled: set[Sequence] = field(default_factory=set)
    unknown: list[Sequence] = field(default_factory=list)
    """Those whose next token is in flight."""

    def __post_init__(self) -> None:
        if self.mode is SharingMode.BASE_SHARED:
            self.slots += -(-self.slots // self.per)  # room for the LR entries
        self.cache = RoleCache(self.mode, self.slots, lr_per_slot=self.per, a_digest="A", growth=self.growth)
        self.cache.set_live_writers(WRITERS)
        self.scheduler = Scheduler(self.cache, self.max_sequences, self.token_budget)
        self.device = Device(self.cache)
        self.stops: dict[Sequence, int] = {}

    def add(
        self,
        prompt: list[int],
        answer: int = 3,
        role: EngineRole = ROLES[0],
        salt: str = "",
        *,
        tags: list[int] | None = None,
        stop: int | None = None,
    ) -> Sequence:
        """stop: the answer ends after so many tokens, which nobody knows beforehand."""
        self.count += 1
        params = SamplingParams(max_tokens=answer)
        sequence = Sequence(
            request=GenerationRequest(str(self.count), role.name, Prompt(tuple(prompt)), params, salt),
            role=role,
            tags=np.array(tags or [role.reader.writer] * len(prompt), np.int64),
            capacity=len(prompt) + answer,
            seed=0,
            detokenizer=Detokenizer(TOKENIZER, SamplingParams()),
            on_chunk=lambda _: None,
        )
        self.stops[sequence] = min(answer, stop or answer)
        self.device.tokens[sequence] = list(prompt)
        self.scheduler.add(sequence)
        return sequence

    def cancel(self, sequence: Sequence) -> None:
        """As a client that goes away."""
        if sequence not in self.finished and sequence not in self.cancelled:
            self.cancelled.add(sequence)
            self.scheduler.remove(sequence)

    def step(self) -> list[Piece]:
        """Launch a step, and learn the tokens of the step before if steps overlap, else of this one."""
        known = {s.held: s.computed for s in self.scheduler.running}
        pieces = self.scheduler.schedule()
        self.check(pieces, known)
        drawing = [piece.sequence for piece in pieces if piece.yields_token]
        assert all(len(self.device.tokens[p.sequence]) == p.end for p in pieces if p.yields_token), "drawn twice"
        for piece in pieces:
            self.device.run(piece)
            self.scheduler.advanced(piece)
        for sequence in drawing:
            tokens, lease = self.device.tokens[sequence], sequence.held
            tokens.append(answer_token(tokens))
            sequence.in_flight += 1
            if len(sequence.generated) + sequence.in_flight < sequence.request.params.max_tokens:
                lease.append(-1, sequence.role.reader.writer)
        self.scheduler.check_integrity()
        learnt, self.unknown = (self.unknown, drawing) if self.overlap else (drawing, [])
        for sequence in learnt:
            self.learn(sequence)
        self.scheduler.check_integrity()
        assert all((node.tokens >= 0).all() for _, node in self.cache.base_tree._nodes()), "a placeholder was handed in"
        return pieces

    def learn(self, sequence: Sequence) -> None:
        """The oldest token in flight of a sequence becomes known."""
        if sequence in self.finished or sequence in self.cancelled:
            return
        prompt = sequence.request.prompt.ids
        token = self.device.tokens[sequence][len(prompt) + len(sequence.generated)]
        sequence.in_flight -= 1
        sequence.generated.append(token)
        if len(sequence.generated) == self.stops[sequence]:
            self.scheduler.remove(sequence)
            self.finished.append(sequence)
        elif sequence.lease is not None:
            sequence.lease.tokens[len(prompt) + len(sequence.generated) - 1] = token

    def check(self, pieces: list[Piece], known: dict[Lease, int]) -> None:
        assert sum(piece.end - piece.start for piece in pieces) <= self.token_budget
        assert len({id(piece.sequence) for piece in pieces}) == len(pieces), "a sequence was taken twice"
        assert len(self.scheduler.running) <= self.max_sequences
        for piece in pieces:
            lease = piece.sequence.held
            assert piece.start == piece.sequence.computed < piece.end <= lease.length
            assert known.get(lease, piece.start) == piece.start
            assert lease.reserved >= piece.end, "a piece has no slots"
            assert piece.sequence in self.scheduler.running
            assert 0 <= piece.sequence.row < self.max_sequences
            if self.cache.own_residuals:
                assert lease.lr_reserved >= piece.end, "a piece has no LR slots"

    def run(self, most: int = 3000) -> None:
        """To the end, and check it."""
        self.run_until_idle(most)
        self.check_end()

    def run_until_idle(self, most: int = 3000) -> None:
        """Until nobody is left; fails where nothing is done."""
        for _ in range(most):
            if not (self.scheduler.waiting or self.scheduler.running):
                break
            waited = bool(self.unknown)
            assert self.step() or waited, "there is something to do and nothing is done"

    def check_end(self) -> None:
        """Everybody has gone, every answer is right, and no slot is lost."""
        left = [*self.scheduler.waiting, *self.scheduler.running]
        assert not left, "the scheduler does not come to an end"
        for sequence in self.finished:
            expected = expected_answer(sequence)[: self.stops[sequence]]
            assert sequence.generated == expected
        assert self.cache.base_pool.used_count == self.cache.base_tree.size + self.cache.lr_pool.page_count
        assert self.cache.lr_pool.used_count == self.cache.lr_tree.size
        self.cache.clear()
        self.cache.check_integrity()
        assert self.cache.base_pool.used_count == self.cache.lr_pool.used_count == 0

    def found(self, tokens: list[int], role: EngineRole = ROLES[0]) -> Lease:
        """What a new request with these tokens would find."""
        ids = np.array([*tokens, 0])
        lease = self.cache.open(ids, ids, opening=1, reader=role.reader, salt="", capacity=0)
        self.cache.close(lease, 0)
        return lease


def answer_token(context: list[int]) -> int:
    return (sum(context) * 31 + len(context)) % 250


def expected_answer(sequence: Sequence) -> list[int]:
    context = sequence.request.prompt.ids.tolist()
    for _ in range(sequence.request.params.max_tokens):
        context.append(answer_token(context))
    return context[len(sequence.request.prompt.ids) :]


def spans(pieces: list[Piece]) -> list[tuple[str, int, int]]:
    return [(piece.sequence.request.request_id, piece.start, piece.end) for piece in pieces]
