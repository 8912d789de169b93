"""A request while it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from lragent.serve.cache.elements import Ints, Tokens
from lragent.serve.cache.lease import Lease
from lragent.serve.engine.constraint import Constraint
from lragent.serve.engine.detokenizer import Detokenizer
from lragent.serve.engine.roles import EngineRole
from lragent.serve.engine.types import Chunk, GenerationRequest, TokenLogprob, Usage


@dataclass(eq=False)
class Sequence:
    """One request in the scheduler's hands.

    tags: [P], who is to write each prompt position. seed: of its random draws. generated: answer tokens as far as they
    are known. last_logprob: of the last one, where asked for. lease: None while waiting. computed: positions whose
    cache is written (or was found), or is being written by a step that was launched. in_flight: tokens drawn by
    launched steps that are not known yet; the lease holds placeholders for them. row: its row in the device's tables
    while it runs, else -1. came: the scheduler's step in which it came. served: that in which it last had a piece, or
    was admitted.
    """

    request: GenerationRequest
    role: EngineRole
    tags: Ints
    capacity: int
    seed: int
    detokenizer: Detokenizer
    on_chunk: Callable[[Chunk], None]
    constraint: Constraint | None = None
    """What its tokens may be."""
    generated: list[int] = field(default_factory=list)
    last_logprob: TokenLogprob | None = None
    lease: Lease | None = None
    computed: int = 0
    in_flight: int = 0
    row: int = -1
    came: int = 0
    served: int = 0
    held_tokens: float = 0.0
    """Positions that it has held, each by the seconds for which it did."""
    held_since: float | None = None
    usage_at_start: Usage | None = None
    """Prompt counts of the first admission; a preemption does not change them."""

    @property
    def held(self) -> Lease:
        """The lease of a running sequence."""
        assert self.lease is not None, "this sequence does not run"
        return self.lease

    @property
    def keepable(self) -> int:
        """Computed positions that may be handed to the trees.

        Their tokens are known, and they lie before the answer's last token: if that ends the turn, a step that was
        launched meanwhile has computed a position after the end.
        """
        return min(self.computed, len(self.request.prompt.ids) + max(0, len(self.generated) - 1))

    @property
    def goes_on(self) -> bool:
        """Whether another token will follow those that are known or drawn."""
        drawn = len(self.generated) + self.in_flight
        return drawn < self.request.params.max_tokens and self.held.length < self.capacity

    @property
    def full(self) -> bool:
        """Whether the answer has all the tokens that it may have."""
        known = len(self.request.prompt.ids) + len(self.generated)
        return len(self.generated) == self.request.params.max_tokens or known > self.capacity

    def take(self, token: int) -> None:
        """A token that was drawn is known now."""
        position = len(self.request.prompt.ids) + len(self.generated)
        self.generated.append(token)
        if self.lease is not None and position < self.lease.length:
            self.lease.tokens[position] = token

    def note_held(self, now: float) -> None:
        """At `now` (seconds) it holds what its lease says."""
        if self.held_since is not None and self.lease is not None:
            self.held_tokens += (now - self.held_since) * self.lease.length
        self.held_since = None if self.lease is None else now

    def inherit(self, writer: int) -> None:
        """`writer` has gone: what it was to write, and has not yet, this sequence's own role writes."""
        own = self.role.reader.writer
        self.tags = np.where(self.tags == writer, own, self.tags)
        if self.lease is not None:
            ahead = self.lease.tags[self.computed : self.lease.length]
            ahead[ahead == writer] = own

    def context(self) -> tuple[Tokens, Ints]:
        """What is known: the tokens of prompt and answer, and who is to write each."""
        tokens, tags = self.request.prompt.ids, self.tags
        if not self.generated:
            return tokens, tags
        own = np.full(len(self.generated), self.role.reader.writer)
        return np.concatenate([tokens, np.array(self.generated, np.int32)]), np.concatenate([tags, own])

    def usage(self, bytes_per_token: int = 0) -> Usage:
        """What this request cost up to now. bytes_per_token: what one position of its cache takes."""
        start = self.usage_at_start or Usage(len(self.request.prompt.ids), 0, 0, 0, 0, 0)
        return Usage(
            prompt_tokens=start.prompt_tokens,
            completion_tokens=len(self.generated),
            tokens_computed=start.tokens_computed,
            base_reused=start.base_reused,
            lr_reused=start.lr_reused,
            lr_prefilled=start.lr_prefilled,
            kv_byte_seconds=self.held_tokens * bytes_per_token,
        )


@dataclass(frozen=True)
class Piece:
    """Part of a step: positions `[start, end)` of a sequence are to be processed."""

    sequence: Sequence
    start: int
    end: int

    @property
    def yields_token(self) -> bool:
        """Whether this piece reaches the end of what is known, so that a next token is drawn."""
        return self.end == self.sequence.held.length
