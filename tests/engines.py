"""Tiny engines for tests, and a trajectory driven through one of them step by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tiny import make_adapter_set, tiny_model, tiny_tokenizer

from lragent.adapter_set import AdapterSet
from lragent.attention import ATTENTION, register_attention
from lragent.modes import SharingMode
from lragent.serve.engine.build import build_engine
from lragent.serve.engine.engine import Engine
from lragent.serve.engine.service import joined
from lragent.serve.engine.types import Chunk, GenerationRequest, Prompt, SamplingParams

GREEDY = {"temperature": 0.0, "ignore_eos": True}


def tiny_engine(
    sharing: SharingMode | str,
    adapters: AdapterSet | None = None,
    *,
    model_seed: int = 0,
    model_options: dict[str, Any] | None = None,
    **options: Any,
) -> Engine:
    """An engine over a tiny model; `adapters` None makes three random roles. Unwritten cache is poisoned with NaN."""
    register_attention()
    model = tiny_model(model_seed, **(model_options or {}))
    adapters = adapters or make_adapter_set(model)
    model.set_attn_implementation(ATTENTION)
    options.setdefault("cache_tokens", 1024)
    options.setdefault("max_model_len", 512)
    engine = build_engine(model, tiny_tokenizer(), adapters, sharing=SharingMode(sharing), **options)
    pools = engine._runner._pools
    for pool in (pools.key, pools.value, pools.low_v, pools.low_k):
        if pool is not None:
            pool.fill_(float("nan"))
    return engine


@dataclass
class Recorder:
    """Keeps the logits of every step by request, and the chunks."""

    engine: Engine
    logits: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    chunks: dict[str, list[Chunk]] = field(default_factory=dict)
    count: int = 0

    def __post_init__(self) -> None:
        run = self.engine._runner.run

        def recorded(pieces: Any) -> torch.Tensor:
            logits = run(pieces)
            yielding = [piece.sequence.request.request_id for piece in pieces if piece.yields_token]
            for name, row in zip(yielding, logits, strict=True):
                self.logits.setdefault(name, []).append(row.clone())
            return logits

        self.engine._runner.run = recorded  # type: ignore[method-assign]

    def submit(
        self,
        role: str,
        ids: Sequence[int],
        max_tokens: int = 8,
        *,
        position_roles: Sequence[str] | None = None,
        opening: int = 1,
        salt: str = "",
        **params: Any,
    ) -> str:
        """Queue a request; returns its id."""
        self.count += 1
        name = f"request-{self.count}"
        roles = None if position_roles is None else tuple(position_roles)
        settings = SamplingParams(**{**GREEDY, **params, "max_tokens": max_tokens})
        request = GenerationRequest(name, role, Prompt(tuple(ids), roles, opening), settings, salt)
        self.chunks[name] = []
        self.engine.add(request, self.chunks[name].append)
        return name

    def finish(self) -> None:
        """Step until nothing is left, checking the cache's integrity at each step."""
        while self.engine.busy:
            self.engine.step()
            self.engine.cache.check_integrity()

    def ask(self, role: str, ids: Sequence[int], max_tokens: int = 8, **options: Any) -> Chunk:
        """One request run to its end."""
        name = self.submit(role, ids, max_tokens, **options)
        self.finish()
        return self.answer(name)

    def answer(self, name: str) -> Chunk:
        """A finished request's answer."""
        return joined(self.chunks[name])

    def last_logits(self) -> torch.Tensor:
        """[n, vocab]: logits of each token of the latest request."""
        return torch.stack(self.logits[f"request-{self.count}"])
