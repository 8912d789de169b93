"""The engine: requests in, chunks of text out, one step at a time. Knows no threads and no HTTP."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from lragent.errors import UserError
from lragent.modes import SharingMode
from lragent.serve.cache.elements import Ints
from lragent.serve.cache.lease import Lease, Reader
from lragent.serve.cache.role_cache import RoleCache
from lragent.serve.cache.view import CacheView
from lragent.serve.engine.constraint import Allowed, Constraint
from lragent.serve.engine.detokenizer import Detokenizer
from lragent.serve.engine.grammar import Grammars
from lragent.serve.engine.launched import Launched
from lragent.serve.engine.role_weights import PreparedRole, RoleWeights
from lragent.serve.engine.roles import EngineRole, RoleTable
from lragent.serve.engine.runner import Runner
from lragent.serve.engine.scheduler import Scheduler
from lragent.serve.engine.sequence import Piece, Sequence
from lragent.serve.engine.turns import TurnMemory
from lragent.serve.engine.types import (
    Chunk,
    ContextFullError,
    FinishReason,
    GenerationRequest,
    QueueFullError,
    SamplingParams,
    TokenLogprob,
    UnknownRoleError,
    Usage,
)

logger = logging.getLogger(__name__)


MOST_WAITING = 1024

EngineView = tuple[CacheView, dict[int, str], dict[str, str]]
"""The cache, and the names of roles by writer's tag and by digest, as far as they are loaded."""


@dataclass(frozen=True)
class EngineLimits:
    """max_context: tokens of prompt and answer together. max_waiting: requests queued before new ones are refused."""

    max_context: int
    max_waiting: int


@dataclass
class TokenSums:
    """What ended requests have cost together, see `Usage`."""

    finished: int = 0
    prompt_tokens: int = 0
    tokens_computed: int = 0
    base_reused: int = 0
    lr_reused: int = 0
    lr_prefilled: int = 0
    generated: int = 0

    def add(self, usage: Usage) -> None:
        """One more request has ended."""
        self.finished += 1
        self.prompt_tokens += usage.prompt_tokens
        self.tokens_computed += usage.tokens_computed
        self.base_reused += usage.base_reused
        self.lr_reused += usage.lr_reused
        self.lr_prefilled += usage.lr_prefilled
        self.generated += usage.completion_tokens


@dataclass
class EngineStats(TokenSums):
    """Running sums, and what is going on now."""

    running: int = 0
    waiting: int = 0
    drawn: int = 0
    """Tokens of answers, those of open requests too."""
    slots_total: int = 0
    slots_used: int = 0
    slots_cached: int = 0
    device_busy_s: float = 0.0
    device_idle_s: float = 0.0
    """On a GPU: how long it worked on steps, and how long it waited for the host between two of them."""
    preempted: int = 0
    base_evicted: int = 0
    lr_evicted: int = 0
    held_back: int = 0
    """How many times a request waited for another that computed the same new prefix."""
    stood_aside: int = 0
    """How many times one waited lest it take the cache of others that come back for it."""
    base_bytes_used: int = 0
    base_bytes_total: int = 0
    lr_bytes_used: int = 0
    lr_bytes_total: int = 0
    """In `base_shared` base and LR cache share one memory, which is the total of both."""
    roles: Mapping[str, TokenSums] = field(default_factory=dict)
    """The sums of the requests of each role, by the name that they asked for."""
    role_places: int = 0
    running_roles: Mapping[str, int] = field(default_factory=dict)
    """Open requests by role."""


class Engine:
    """Serves one model and its roles in one sharing mode. Not thread-safe: one caller at a time."""

    def __init__(
        self,
        *,
        runner: Runner,
        scheduler: Scheduler,
        tokenizer: PreTrainedTokenizerBase,
        roles: RoleTable,
        weights: RoleWeights | None,
        writer_of: Callable[[str], Reader],
        end_tokens: frozenset[int],
        vocab_size: int,
        limits: EngineLimits,
        seed: int = 0,
    ) -> None:
        self.turns = TurnMemory()
        self.grammars = Grammars(tokenizer, vocab_size, end_tokens)
        self.tokenizer = tokenizer
        self.limits = limits
        self.roles = roles
        self.weights = weights
        """Where roles can be put while the engine runs; None where it has none."""
        self._writer_of = writer_of
        self._role_sums: dict[str, TokenSums] = {}
        self._runner = runner
        self._scheduler = scheduler
        self._begun: dict[int, Lease] = {}
        """By row, under which lease the sampler was told of its sequence."""
        self._launched: Launched | None = None
        """A step that the device works on while the next one is made."""
        self.end_tokens = end_tokens
        """That end a turn."""
        self._vocab_size = vocab_size
        self._seed = seed
        self._open: dict[str, Sequence] = {}
        self._sums = EngineStats()
        self._look_at_writers()

    @property
    def cache(self) -> RoleCache:
        """The cache, for inspection."""
        return self._scheduler.cache

    @property
    def seats(self) -> int:
        """Requests that run at once."""
        return self._scheduler.max_sequences

    @property
    def sharing(self) -> SharingMode:
        """The sharing mode."""
        return self.cache.mode

    @property
    def device(self) -> str:
        """Where the model is, as torch calls it."""
        return str(self._runner.device)

    @property
    def busy(self) -> bool:
        """Whether a step would do something."""
        return bool(self._open) or self._launched is not None

    def check(self, request: GenerationRequest) -> None:
        """Raises UserError where `request` cannot be served. Any thread may call it; a new grammar is compiled here."""
        roles = self.roles.named
        if request.role not in roles:
            known = ", ".join(roles)
            raise UnknownRoleError(f"model: the role {request.role!r} is not loaded; loaded are {known}.")
        ids = request.prompt.ids
        if not len(ids):
            raise UserError("prompt: must hold at least one token.")
        if len(ids) >= self.limits.max_context:
            raise ContextFullError(
                f"prompt: {len(ids)} tokens leave no room for an answer in a context of {self.limits.max_context}; "
                "shorten it, or start the server with a larger --max-model-len and a cache that holds as much."
            )
        if ids.min() < 0 or ids.max() >= self._vocab_size:
            raise UserError(f"prompt: token ids must be between 0 and {self._vocab_size - 1}.")
        if any(token >= self._vocab_size for token, _ in request.params.logit_bias):
            raise UserError(f"logit_bias: token ids must be between 0 and {self._vocab_size - 1}.")
        if any(token >= self._vocab_size for token in request.params.stop_token_ids):
            raise UserError(f"stop_token_ids: token ids must be between 0 and {self._vocab_size - 1}.")
        if request.params.grammar is not None:
            self.grammars.matcher(request.params.grammar)

    def add(self, request: GenerationRequest, on_chunk: Callable[[Chunk], None]) -> None:
        """Queue a request. Raises UserError, QueueFullError."""
        self.check(request)
        if request.request_id in self._open:
            raise UserError(f"request_id: {request.request_id!r} is running already.")
        if len(self._scheduler.waiting) >= self.limits.max_waiting:
            raise QueueFullError(f"{self.limits.max_waiting} requests wait already; try again later.")
        role = self.roles.named[request.role]
        self._seed += 1
        sequence = Sequence(
            request=request,
            role=role,
            tags=self._tags(request, role),
            capacity=min(self.limits.max_context, len(request.prompt.ids) + request.params.max_tokens),
            seed=self._seed if request.params.seed is None else request.params.seed,
            detokenizer=Detokenizer(self.tokenizer, request.params),
            on_chunk=on_chunk,
            constraint=self._constraint(request.params),
        )
        self._open[request.request_id] = sequence
        self.roles.begin(role)
        self._scheduler.add(sequence)

    def _constraint(self, params: SamplingParams) -> Constraint | None:
        if params.grammar is None and not params.min_tokens:
            return None
        matcher = None if params.grammar is None else self.grammars.matcher(params.grammar)
        return Constraint(matcher, params.min_tokens, self.end_tokens | set(params.stop_token_ids))

    def _tags(self, request: GenerationRequest, role: EngineRole) -> Ints:
        """[P], who is to write each prompt position. The role asked for stands in for those that are not loaded."""
        size, speakers = len(request.prompt.ids), request.prompt.speakers
        if speakers is None or not self.sharing.one_writer_per_token:
            return np.full(size, role.reader.writer, np.int64)
        writers = [self.roles.named.get(name, role).reader.writer for name, _ in speakers]
        tags = np.repeat(np.array(writers, np.int64), [count for _, count in speakers])
        tags[size - request.prompt.opening :] = role.reader.writer
        return tags

    def put_role(self, prepared: PreparedRole) -> None:
        """Load a role, in the place of another of its name where there is one. Requests that run go on with what they
        began with. Raises RoleRoomError where no place is free."""
        assert self.weights is not None, "no projection is adapted"
        place = self.roles.free_place()
        self.weights.put(place, prepared)
        self._left(self.roles.put(EngineRole(prepared.name, place, self._writer_of(prepared.digest))))

    def drop_role(self, name: str) -> None:
        """Unload a role. Requests of it that run go on to their end."""
        self._left(self.roles.drop(name))

    def _left(self, role: EngineRole | None) -> None:
        """Roles have changed. role: one that has left its place by that."""
        if role is not None and self.weights is not None:
            self.weights.clear(role.index)
            if role.reader.writer not in self.roles.role_of:
                for sequence in self._open.values():
                    sequence.inherit(role.reader.writer)
        self._look_at_writers()

    def _look_at_writers(self) -> None:
        self.cache.set_live_writers(self.roles.writers)

    def cancel(self, request_id: str) -> None:
        """End a request now; unknown ids are ignored, since a request may end at any moment."""
        sequence = self._open.get(request_id)
        if sequence is not None:
            self._finish(sequence, FinishReason.CANCELLED, "")

    def cancel_all(self) -> None:
        """End every request now."""
        for request_id in list(self._open):
            self.cancel(request_id)

    def step(self) -> None:
        """Process one batch: schedule, run, draw, hand out.

        On a GPU it hands out what the batch before has drawn, while the device works on this one.
        """
        pieces = self._scheduler.schedule()
        launched = self._launch(pieces) if pieces else None
        if self._runner.ahead:
            launched, self._launched = self._launched, launched
        if launched is not None:
            self._read(launched)

    def _launch(self, pieces: list[Piece]) -> Launched:
        for piece in pieces:
            self._begin(piece.sequence)
        now = time.perf_counter()
        for piece in pieces:
            piece.sequence.note_held(now)
        constrained = any(piece.sequence.constraint for piece in pieces)
        launched = self._runner.launch(pieces, self._launched, self._constrain if constrained else None)
        for piece in pieces:
            sequence = piece.sequence
            if sequence.lease is None:
                continue  # it has ended meanwhile, see _constrain
            yields_token = piece.yields_token
            self._scheduler.advanced(piece)
            if yields_token:
                sequence.in_flight += 1
                if sequence.goes_on:  # with a token that is not known yet
                    sequence.held.append(0, sequence.role.reader.writer)
        return launched

    def _constrain(self, sequences: tuple[Sequence, ...]) -> Allowed | None:
        """What the next tokens may be. That can depend on those of the step before: it is read now, while the device
        works on this one, so that it never waits for the host to work out a mask."""
        if self._launched is not None:
            before, self._launched = self._launched, None
            self._read(before)
        asking = [
            (at, sequence, sequence.constraint)
            for at, sequence in enumerate(sequences)
            if sequence.lease is not None and sequence.constraint is not None
        ]
        asking = [each for each in asking if each[2].limits(len(each[1].generated))]
        if not asking:
            return None
        bits = torch.zeros(len(asking), (self._vocab_size + 31) // 32, dtype=torch.int32)
        for row, (_, sequence, constraint) in zip(bits.numpy(), asking, strict=True):
            try:
                constraint.allow(row, len(sequence.generated))
            except UserError as fault:
                row.fill(-1)
                self._finish(sequence, FinishReason.ERROR, "", fault=fault)
        return Allowed([at for at, *_ in asking], bits)

    def _begin(self, sequence: Sequence) -> None:
        """Tell the sampler of a sequence that starts, or resumes, in its row."""
        if self._begun.get(sequence.row) is not sequence.held:
            request = sequence.request
            self._begun[sequence.row] = sequence.held
            self._runner.sampler.begin(
                sequence.row,
                request.params,
                sequence.seed,
                request.prompt.ids.tolist() if request.params.penalised else (),
                sequence.generated,
            )

    def _read(self, launched: Launched) -> None:
        """Hand out a step's tokens. Those of requests that have ended meanwhile are nobody's."""
        read = launched.read()
        if launched.times is not None:
            busy, idle = launched.times.seconds()
            self._sums.device_busy_s += busy
            self._sums.device_idle_s += idle
        for sequence, (token, logprob) in zip(launched.sequences, read, strict=True):
            sequence.in_flight -= 1
            if self._open.get(sequence.request.request_id) is sequence:
                self._take(sequence, token, logprob)

    def _take(self, sequence: Sequence, token: int, logprob: TokenLogprob | None) -> None:
        """The next token of an answer."""
        params = sequence.request.params
        sequence.take(token)
        self._sums.drawn += 1
        sequence.last_logprob = logprob
        constraint = sequence.constraint
        if constraint is not None:
            try:
                constraint.take(token)
            except UserError as fault:
                self._finish(sequence, FinishReason.ERROR, "", fault=fault)
                return
        if (token in self.end_tokens and not params.ignore_eos) or token in params.stop_token_ids:
            self._finish(sequence, FinishReason.STOP, sequence.detokenizer.finish())
            return
        piece = sequence.detokenizer.push(token)
        if sequence.detokenizer.stopped:
            self._finish(sequence, FinishReason.STOP, piece)
        elif constraint is not None and constraint.ended:
            self._finish(sequence, FinishReason.STOP, piece + sequence.detokenizer.finish())
        elif sequence.full:
            self._finish(sequence, FinishReason.LENGTH, piece + sequence.detokenizer.finish())
        else:
            self._tell(sequence, Chunk(text=piece, token_ids=(token,), logprobs=_listed(logprob)))

    def _finish(self, sequence: Sequence, reason: FinishReason, text: str, *, fault: UserError | None = None) -> None:
        """End a request. fault: what it asks for that cannot be done after all."""
        sequence.note_held(time.perf_counter())
        self._scheduler.remove(sequence)
        usage = self._sum_up(sequence)
        if reason in (FinishReason.STOP, FinishReason.LENGTH) and not sequence.detokenizer.stopped:
            self._remember(sequence)
        last: tuple[int, ...] = ()
        logprobs: tuple[TokenLogprob, ...] = ()
        if reason not in (FinishReason.CANCELLED, FinishReason.ERROR):
            last, logprobs = tuple(sequence.generated[-1:]), _listed(sequence.last_logprob)
        self._close(sequence)  # only now: until it is told, `fail_all` must find it
        error = None if fault is None else str(fault)
        self._tell(sequence, Chunk(text, last, logprobs, reason, usage, error, fault))

    def _sum_up(self, sequence: Sequence) -> Usage:
        usage = sequence.usage(self.cache.bytes_per_token)
        self._sums.add(usage)
        self._role_sums.setdefault(sequence.role.name, TokenSums()).add(usage)
        return usage

    def _close(self, sequence: Sequence) -> None:
        del self._open[sequence.request.request_id]
        left = self.roles.end(sequence.role)
        if left is not None:
            self._left(left)

    def _tell(self, sequence: Sequence, chunk: Chunk) -> None:
        """Hand a chunk out. The request of whoever fails to take it is cancelled; nobody else is to notice."""
        try:
            sequence.on_chunk(chunk)
        except Exception:
            logger.exception("the receiver of %s has failed", sequence.request.request_id)
            if chunk.finish_reason is None:
                self.cancel(sequence.request.request_id)

    def _remember(self, sequence: Sequence) -> None:
        key = sequence.request.prompt.key
        if key is not None:
            self.turns.remember_turn(key, sequence.detokenizer.text, sequence.generated, self.end_tokens)

    def fail_all(self, error: str) -> None:
        """End every request with an error, after a fault of a step."""
        for sequence in list(self._open.values()):
            usage = self._sum_up(sequence)
            del self._open[sequence.request.request_id]
            self._tell(sequence, Chunk(finish_reason=FinishReason.ERROR, usage=usage, error=error))

    def view(self, most: int) -> EngineView:
        """At most `most` nodes of it."""
        named = self.roles.named.values()
        writers = {role.reader.writer: role.name for role in named}
        return self.cache.view(most), writers, {role.reader.digest: role.name for role in named}

    def stats(self) -> EngineStats:
        """A snapshot."""
        cache = self.cache
        memory = cache.memory()
        return replace(
            self._sums,
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            slots_total=cache.base_pool.size,
            slots_used=cache.base_pool.used_count,
            slots_cached=cache.base_tree.size,
            preempted=self._scheduler.preempted,
            base_evicted=cache.counters.base_evicted,
            lr_evicted=cache.counters.lr_evicted,
            held_back=self._scheduler.held_back,
            stood_aside=self._scheduler.stood_aside,
            base_bytes_used=memory.base_used,
            base_bytes_total=memory.base_total,
            lr_bytes_used=memory.lr_used,
            lr_bytes_total=memory.lr_total,
            roles={name: replace(sums) for name, sums in list(self._role_sums.items())},
            role_places=self.roles.room,
            running_roles=self.roles.running(),
        )


def _listed(logprob: TokenLogprob | None) -> tuple[TokenLogprob, ...]:
    return () if logprob is None else (logprob,)


def end_tokens_of(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Every id that ends a turn: the tokenizer's and those of the model's generation config."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    several = configured if isinstance(configured, list) else [configured]
    return frozenset(token for token in (tokenizer.eos_token_id, *several) if token is not None)
