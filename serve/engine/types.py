"""The nouns of the engine: what comes in, what goes out, and which part fills each field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from enum import StrEnum
from itertools import groupby
from numbers import Integral, Real
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from lragent.errors import LRAgentError, UserError
from lragent.serve.engine.grammar import Grammar
from lragent.serve.engine.turns import ContextKey


class FinishReason(StrEnum):
    """Why a request ended."""

    STOP = "stop"
    """The model ended its turn, or a stop string was met."""
    LENGTH = "length"
    """`max_tokens` were generated, or the context is full."""
    CANCELLED = "cancelled"
    """The client went away."""
    ERROR = "error"
    """The engine failed; `Chunk.error` says how."""


class EngineDeadError(LRAgentError):
    """The engine thread has ended by a fault: nothing can be generated any more."""


class ReplicaLostError(EngineDeadError):
    """The engine that ran a request has gone, and others have not: the request can be sent again."""


class NoReplicaError(EngineDeadError):
    """Of several engines none runs just now."""

    def __init__(self, message: str = "No replica runs at this moment; they are being started anew.") -> None:
        super().__init__(message)


class QueueFullError(LRAgentError):
    """Too many requests wait already."""


class UnknownRoleError(UserError):
    """The role asked for is not loaded."""


class ContextFullError(UserError):
    """The prompt leaves no room for an answer."""


MAX_BIASED = 300
"""Token ids in one `logit_bias`."""
MAX_STOP_TOKENS = 64
"""Token ids in one `stop_token_ids`."""
MAX_LOGPROBS = 20
"""Alternatives reported beside each token."""


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen and when to stop.

    temperature: 0 is greedy. top_k: 0 is off. top_p, min_p: shares of probability. stop: strings that end the text;
    they are part of it only with `include_stop`. stop_token_ids: tokens that end it, beside the model's own.
    min_tokens: none of these tokens is drawn before. seed: None draws one. ignore_eos: go on past the end of the turn
    until `max_tokens`. skip_special_tokens: leave them out of the text. grammar: what the text must match.
    presence_penalty, frequency_penalty: taken off the logits of generated tokens, once and for each time (OpenAI's).
    repetition_penalty: divides the logits of tokens of prompt and answer, multiplies negative ones. logit_bias: token
    ids and what is added to their logits, before penalties. logprobs: how many alternatives to report beside each
    token's log-probability; None is off.
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    grammar: Grammar | None = None

    @property
    def penalised(self) -> bool:
        """Whether what was said changes what is likely."""
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0 or self.repetition_penalty != 1.0

    def __post_init__(self) -> None:
        """Takes one string for `stop`, and a mapping for `logit_bias`. Raises UserError naming the field at fault."""
        self._take_forms()
        sane_stop = len(self.stop) <= 16 and all(0 < len(text) <= 256 for text in self.stop)
        sane_ends = len(self.stop_token_ids) <= MAX_STOP_TOKENS and min(self.stop_token_ids, default=0) >= 0
        biased = {token for token, _ in self.logit_bias}
        sane_bias = len(biased) == len(self.logit_bias) <= MAX_BIASED and all(
            token >= 0 and -100.0 <= value <= 100.0 for token, value in self.logit_bias
        )
        limits = (
            ("max_tokens", self.max_tokens >= 1, "must be at least 1"),
            ("min_tokens", 0 <= self.min_tokens <= self.max_tokens, f"must be 0 to max_tokens, {self.max_tokens}"),
            ("temperature", 0.0 <= self.temperature <= 2.0, "must be between 0 and 2"),
            ("top_p", 0.0 < self.top_p <= 1.0, "must be above 0 and at most 1"),
            ("top_k", 0 <= self.top_k <= 1_000_000, "must be 0 (off) or a positive number of tokens"),
            ("min_p", 0.0 <= self.min_p < 1.0, "must be at least 0 and below 1"),
            ("seed", self.seed is None or -(2**63) <= self.seed < 2**63, "must fit in 64 bits"),
            ("stop", sane_stop, "must be at most 16 strings of 1 to 256 characters"),
            ("stop_token_ids", sane_ends, f"must be at most {MAX_STOP_TOKENS} token ids"),
            ("presence_penalty", -2.0 <= self.presence_penalty <= 2.0, "must be between -2 and 2"),
            ("frequency_penalty", -2.0 <= self.frequency_penalty <= 2.0, "must be between -2 and 2"),
            ("repetition_penalty", 0.0 < self.repetition_penalty <= 2.0, "must be above 0 and at most 2"),
            ("logit_bias", sane_bias, f"must give at most {MAX_BIASED} different token ids a number from -100 to 100"),
            ("logprobs", self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS, f"must be 0 to {MAX_LOGPROBS}"),
        )
        for name, holds, mend in limits:
            if not holds:
                raise UserError(f"{name}: {mend}, not {getattr(self, name)!r}.")

    def _take_forms(self) -> None:
        """Bring every field into its form. Raises UserError where it has another."""
        forms: dict[str, Any] = {
            name: _whole(name, getattr(self, name)) for name in ("max_tokens", "min_tokens", "top_k")
        }
        forms |= {
            name: _whole(name, value) for name in ("seed", "logprobs") if (value := getattr(self, name)) is not None
        }
        forms |= {name: _real(name, getattr(self, name)) for name in REALS}
        stop: Any = (self.stop,) if isinstance(self.stop, str) else self.stop or ()
        if not isinstance(stop, list | tuple) or not all(isinstance(text, str) for text in stop):
            raise UserError(f"stop: must be a string or a list of strings, not {self.stop!r}.")
        ends: Any = self.stop_token_ids or ()
        if not isinstance(ends, list | tuple):
            raise UserError(f"stop_token_ids: must be a list of token ids, not {self.stop_token_ids!r}.")
        ends = tuple(_whole("stop_token_ids", token) for token in ends)
        bias = self.logit_bias.items() if isinstance(self.logit_bias, Mapping) else self.logit_bias or ()
        try:
            pairs = tuple((_whole("logit_bias", token), _real("logit_bias", value)) for token, value in bias)
        except (TypeError, ValueError):
            raise UserError(f"logit_bias: must map token ids to numbers, not be {self.logit_bias!r}.") from None
        for name, value in (forms | {"stop": tuple(stop), "stop_token_ids": ends, "logit_bias": pairs}).items():
            object.__setattr__(self, name, value)


REALS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise UserError(f"{name}: must be a whole number, not {value!r}.")
    return int(value)


def _real(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise UserError(f"{name}: must be a number, not {value!r}.")
    return float(value)


@dataclass(frozen=True, eq=False)
class Prompt:
    """A context in tokens, with what is known of who speaks in it.

    token_ids: the whole context, at least one token; kept as an array [P] int32. A long context is best given as one.
    position_roles: the role that processes each position where no cache holds it; None = the role asked for. Used in
        the modes with one writer per token; in the others the role asked for processes all. Kept as `speakers` only,
        which are as few as the turns: a prompt may have to travel. A copy by `replace` must be given them again.
    opening: how many of the last tokens open the turn asked for. They always belong to the role that speaks: they hit
        only entries that this role wrote.
    key: under which the answer is remembered, for a client that sends its text back; None: nobody will.
    tool_spans: half-open spans of tokens that tools have said.
    """

    token_ids: Sequence[int] | npt.NDArray[np.integer[Any]]
    position_roles: InitVar[Sequence[str] | None] = None
    opening: int = 1
    key: ContextKey | None = None
    tool_spans: tuple[tuple[int, int], ...] = ()
    speakers: tuple[tuple[str, int], ...] | None = field(init=False, default=None)
    """`position_roles` as runs: a role, and how many positions it has."""

    def __post_init__(self, position_roles: Sequence[str] | None) -> None:
        """Raises UserError for a number that no token can have. Does what takes long for a long context, so that the
        engine's thread need not."""
        refusal = UserError(
            "prompt: must be token ids, one list of integers of at most 32 bits (or text, or messages)."
        )
        try:
            given = np.asarray(self.token_ids)
        except (OverflowError, ValueError):
            raise refusal from None
        if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
            raise refusal
        ids = given.astype(np.int32)
        if (ids != given).any():
            raise refusal
        ids.flags.writeable = False
        object.__setattr__(self, "token_ids", ids)
        if position_roles is not None:
            runs = tuple((role, sum(1 for _ in run)) for role, run in groupby(position_roles))
            object.__setattr__(self, "speakers", runs)

    def tool_tokens(self, last: int) -> int:
        """How many of its `last` tokens tools have said."""
        start = len(self.ids) - last
        return sum(max(0, end - max(start, begin)) for begin, end in self.tool_spans)

    @property
    def ids(self) -> npt.NDArray[np.int32]:
        """[P], the context; read only."""
        return cast("npt.NDArray[np.int32]", self.token_ids)


@dataclass(frozen=True)
class GenerationRequest:
    """One turn asked of one role. Made by the API (or a caller in process), never changed after."""

    request_id: str
    role: str
    prompt: Prompt
    params: SamplingParams = field(default_factory=SamplingParams)
    salt: str = ""
    """Isolates tenants: nothing cached under another salt is ever found."""
    whole: bool = False
    """Nobody sees a piece of the answer before its end: if it is lost on the way, it can be made anew elsewhere."""


@dataclass(frozen=True)
class Usage:
    """What one request cost, in tokens.

    `tokens_computed + base_reused == prompt_tokens` in every mode but `base_shared`, where tokens of an LR prefill are
    both base-reused and computed: there `lr_prefilled` says how many.
    """

    prompt_tokens: int
    completion_tokens: int
    tokens_computed: int
    """Prompt tokens that went through the model."""
    base_reused: int
    """Prompt tokens whose base cache (or full cache) was found."""
    lr_reused: int
    """Prompt tokens whose LR cache was found."""
    lr_prefilled: int
    """Prompt tokens run over an existing base cache, to write this role's LR cache only."""
    kv_byte_seconds: float = 0.0
    """Bytes of cache that the request held, shared ones too, by how long it held them."""


@dataclass(frozen=True)
class TokenLogprob:
    """How likely a generated token was, before penalties, temperature and filters. top: (id, logprob), best first.

    Logarithms are natural ones. They are not finite where the model's logits were not.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Chunk:
    """A piece of an answer. The last one carries `finish_reason` and `usage`.

    token_ids: all that were generated, those that say nothing included: the end of the turn, the last of a stop string.
    logprobs: one for each of them where the request asks for it, else none.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    error: str | None = None
    fault: LRAgentError | None = None
    """With an error: what to raise, where the request is at fault and not the engine."""


@dataclass(frozen=True)
class RoleCard:
    """A loaded role, as `/v1/models` shows it. `digest` is the content digest of its weights; `base` has none."""

    name: str
    parent: str | None
    root: str
    digest: str | None


@dataclass(frozen=True)
class ReplicaState:
    """One of several engines. name: of its place. open: its requests. starts: how often an engine has begun there.
    left: open requests that were left behind where one ended."""

    name: str
    alive: bool
    open: int
    starts: int
    left: int
