"""What a user has today: transformers + PEFT, one adapter per role, switched between the turns of a trajectory.

Two ways to do it, both with transformers' own attention and cache: prefill the whole context at every turn, or keep one
KV cache per role, crop it to what the new context still begins with, and extend it.
"""

from __future__ import annotations

import inspect
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from lragent.chat import BASE
from lragent.models.quiet import quiet_libraries


@dataclass(frozen=True)
class Turn:
    """One turn of a recorded trajectory: who spoke, after which context, and what."""

    role: str
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    """Everything that was generated, with the token that ended the turn."""


@dataclass(frozen=True)
class FirstToken:
    """token: the greedy next token. computed: prompt tokens that went through the model."""

    token: int
    computed: int
    seconds: float


@dataclass(frozen=True)
class Generation:
    """A greedy answer and when its tokens came."""

    token_ids: tuple[int, ...]
    computed: int
    ttft_s: float
    """Seconds to the first token, adapter switch included."""
    total_s: float

    @property
    def decode_tokens_per_s(self) -> float:
        """Rate of the tokens after the first."""
        return (len(self.token_ids) - 1) / (self.total_s - self.ttft_s)


class PeftTeam:
    """A transformers model with one PEFT adapter per role; one role is active at a time."""

    def __init__(self, model: PreTrainedModel, folders: Mapping[str, Path]) -> None:
        """`model` is changed in place: adapters are injected, in its own dtype. `folders`: PEFT folders by role.

        Without folders this is plain transformers, and `base` its only role.
        """
        self._plain = model
        self._peft: PeftModel | None = None
        with quiet_libraries(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT reads names that transformers is about to drop
            for role, folder in folders.items():
                if self._peft is None:
                    self._peft = PeftModel.from_pretrained(model, str(folder), adapter_name=role)
                else:
                    self._peft.load_adapter(str(folder), adapter_name=role)
        if self._peft is not None:
            self._peft.to(model.dtype).eval()
        self.model: Any = self._peft or model
        # transformers renamed the argument; what it calls its cache is asked of the model itself.
        names = inspect.signature(model.forward).parameters
        self._cache_argument = "cache" if "cache" in names else "past_key_values"

    def new_cache(self) -> DynamicCache:
        """An empty KV cache for this model."""
        return DynamicCache(config=self._plain.config)

    def run(self, role: str, token_ids: Sequence[int], cache: DynamicCache) -> int:
        """Process `token_ids` after what `cache` holds, which grows by them. Returns the greedy next token."""
        with self._speaking(role), torch.inference_mode():
            logits = self.model(
                input_ids=self._tensor(token_ids),
                use_cache=True,
                logits_to_keep=1,
                **{self._cache_argument: cache},
            ).logits
            return int(logits[0, -1].argmax())

    def generate(
        self, role: str, prompt_ids: Sequence[int], cache: DynamicCache, max_tokens: int, end_tokens: Sequence[int]
    ) -> Generation:
        """Generate greedily by transformers' `generate`. `cache` holds a beginning of the prompt and grows.

        Without `end_tokens`, exactly `max_tokens` are generated.
        """
        computed = len(prompt_ids) - cache.get_seq_length()
        config = GenerationConfig(
            max_new_tokens=max_tokens,
            do_sample=False,
            use_cache=True,
            eos_token_id=list(end_tokens) or None,
            pad_token_id=prompt_ids[0],
        )
        ids = self._tensor(prompt_ids)
        clock = _Clock()
        with self._speaking(role), quiet_libraries():
            self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=config,
                streamer=clock,
                **{self._cache_argument: cache},
            )
        answer, times = clock.tokens, clock.times
        return Generation(tuple(answer), computed, times[0] - clock.start, times[-1] - clock.start)

    @contextmanager
    def _speaking(self, role: str) -> Iterator[None]:
        if self._peft is None:
            yield
        elif role == BASE:
            with self._peft.disable_adapter():
                yield
        else:
            if self._peft.active_adapter != role:
                self._peft.set_adapter(role)
            yield

    def _tensor(self, token_ids: Sequence[int]) -> torch.Tensor:
        return torch.tensor([list(token_ids)], device=self._plain.device)


class _Clock:
    """A streamer that notes when each new token comes. `generate` hands it the prompt first."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.times: list[float] = []
        self.tokens: list[int] = []
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen:
            self.times.append(time.perf_counter())
            self.tokens += value.reshape(-1).tolist()
        self._prompt_seen = True

    def end(self) -> None:
        pass


class PrefillAnew:
    """Every turn runs its role over the whole context."""

    name = "prefill anew"

    def __init__(self, team: PeftTeam) -> None:
        self._team = team

    def begin(self) -> None:
        """A new trajectory begins."""

    def first_token(self, turn: Turn) -> FirstToken:
        """The time to the turn's first token."""
        start = time.perf_counter()
        token = self._team.run(turn.role, turn.prompt_ids, self._team.new_cache())
        return FirstToken(token, len(turn.prompt_ids), time.perf_counter() - start)

    def absorb(self, turn: Turn) -> None:
        """The turn's answer was spoken. Nothing is kept."""

    def generate(self, turn: Turn, max_tokens: int, end_tokens: Sequence[int]) -> Generation:
        """The whole turn by `generate`."""
        return self._team.generate(turn.role, turn.prompt_ids, self._team.new_cache(), max_tokens, end_tokens)


class CachePerRole:
    """Every role keeps its own cache of the trajectory, and runs over what is new to it."""

    name = "one cache per role"

    def __init__(self, team: PeftTeam) -> None:
        self._team = team
        self._held: dict[str, _Held] = {}

    def begin(self) -> None:
        """A new trajectory begins: the caches of the last one are dropped."""
        self._held.clear()

    def first_token(self, turn: Turn) -> FirstToken:
        """The time to the turn's first token."""
        start = time.perf_counter()
        held = self._cropped(turn)
        new = turn.prompt_ids[len(held.token_ids) :]
        token = self._team.run(turn.role, new, held.cache)
        held.token_ids = list(turn.prompt_ids)
        return FirstToken(token, len(new), time.perf_counter() - start)

    def absorb(self, turn: Turn) -> None:
        """The answer was spoken by the turn's role, whose cache therefore holds all of it but its last token.

        Stands for decoding, after `first_token`: one pass, which nobody times.
        """
        held, spoken = self._held[turn.role], list(turn.answer_ids[:-1])
        if spoken:
            self._team.run(turn.role, spoken, held.cache)
            held.token_ids += spoken

    def generate(self, turn: Turn, max_tokens: int, end_tokens: Sequence[int]) -> Generation:
        """The whole turn by `generate`; the role's cache then holds what was really generated."""
        held = self._cropped(turn)
        made = self._team.generate(turn.role, turn.prompt_ids, held.cache, max_tokens, end_tokens)
        held.token_ids = [*turn.prompt_ids, *made.token_ids][: held.cache.get_seq_length()]
        return made

    def _cropped(self, turn: Turn) -> _Held:
        """The role's cache, cut to the longest beginning that it shares with the prompt, less its last token."""
        held = self._held.setdefault(turn.role, _Held(self._team.new_cache(), []))
        common = 0
        for ours, theirs in zip(held.token_ids, turn.prompt_ids[:-1], strict=False):
            if ours != theirs:
                break
            common += 1
        surplus = len(held.token_ids) - common
        if surplus:
            held.cache.crop(-surplus)
            held.token_ids = held.token_ids[:common]
        return held


@dataclass
class _Held:
    cache: DynamicCache
    token_ids: list[int]
    """What the cache holds."""


Baseline = PrefillAnew | CachePerRole


def replay(baseline: Baseline, turns: Sequence[Turn]) -> list[FirstToken]:
    """The first token of every turn of one trajectory, in order."""
    baseline.begin()
    firsts = []
    for turn in turns:
        firsts.append(baseline.first_token(turn))
        baseline.absorb(turn)
    return firsts


def fast_dtype(device: str = "cpu") -> torch.dtype:
    """bfloat16 where the machine computes in it natively, else float32."""
    if device != "cpu":
        return torch.bfloat16
    asked: Any = torch.cpu
    flags = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    native = any(getattr(asked, flag, lambda: False)() for flag in flags)
    return torch.bfloat16 if native else torch.float32
