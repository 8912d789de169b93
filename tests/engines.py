"""Tiny engines for tests, and a trajectory driven through one of them step by step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from tiny import make_adapter_set, tiny_model, tiny_tokenizer

from lragent.adapter_set import AdapterSet
from lragent.attention import ATTENTION, register_attention
from lragent.kernels.ops import Way, write_cache
from lragent.modes import SharingMode
from lragent.serve.engine.build import build_engine
from lragent.serve.engine.engine import Engine
from lragent.serve.engine.kernel_pass import KernelAttention
from lragent.serve.engine.launched import Launched
from lragent.serve.engine.sampler import Drawn
from lragent.serve.engine.sequence import Piece
from lragent.serve.engine.service import joined
from lragent.serve.engine.tables import SlotTables
from lragent.serve.engine.types import Chunk, GenerationRequest, Prompt, SamplingParams

ROLES = ("plan", "action", "reflect")
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "torch": {"by_kernels": "torch"},
    "cuda": {"device": "cuda"},
    "graphs": {"device": "cuda", "graphs": True},
}
"""How an engine attends, as options of `tiny_engine`."""
KERNEL_WAYS = ("torch", *(pytest.param(way, marks=pytest.mark.gpu) for way in ("cuda", "graphs")))
each_way = pytest.mark.parametrize("way", ["plain", *KERNEL_WAYS])
GREEDY = {"temperature": 0.0, "ignore_eos": True}


def tiny_engine(
    sharing: SharingMode | str,
    adapters: AdapterSet | None = None,
    *,
    model_seed: int = 0,
    model_options: dict[str, Any] | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    by_kernels: Way | None = None,
    **options: Any,
) -> Engine:
    """An engine over a tiny model; `adapters` None makes three random roles. Unwritten cache is poisoned with NaN.

    by_kernels: attend as on a GPU, this way; for `torch` every kernel is stood in for by its plain-torch form.
    """
    register_attention()
    model = tiny_model(model_seed, **(model_options or {})).to(device, dtype)
    adapters = adapters or make_adapter_set(model)
    model.set_attn_implementation(ATTENTION)
    options.setdefault("cache_tokens", 1024)
    options.setdefault("max_model_len", 512)
    options.setdefault("graphs", False)
    engine = build_engine(model, tiny_tokenizer(), adapters, sharing=SharingMode(sharing), **options)
    attention = engine._runner.attention
    pools = attention.pools
    if by_kernels is not None:
        write = write_cache if by_kernels == "torch" else write_by_triton
        rope = attention.rope and (attention.rope[0].float(), attention.rope[1].float())
        rows, context = engine._scheduler.max_sequences, engine.limits.max_context
        tables = SlotTables(rows, context, engine.cache.own_residuals, pools.key.device)
        engine._runner.attention = KernelAttention(pools, tables, rope, by_kernels, write)
    for pool in (pools.key, pools.value, pools.low_v, pools.low_k):
        if pool is not None:
            pool.fill_(float("nan"))
    return engine


def write_by_triton(*arguments: Any, rotate_key: bool = True) -> None:
    """`write_cache` by its kernel, on a CPU too: in Triton's interpreter."""
    from lragent.kernels.rotary_write import rotary_write

    *tensors, cache = arguments
    rotary_write(*tensors, cache.key, cache.value, cache.low_v, cache.low_k, rotate_key=rotate_key)


@dataclass
class Recorder:
    """Keeps the logits of every step by request, and the chunks."""

    engine: Engine
    logits: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    chunks: dict[str, list[Chunk]] = field(default_factory=dict)
    count: int = 0
    forced: dict[str, Iterator[int]] = field(default_factory=dict)
    """By request: tokens that it is given in place of those drawn."""

    def __post_init__(self) -> None:
        runner = self.engine._runner
        launch, draw = runner.launch, runner.sampler.draw

        def recorded(pieces: list[Piece], *rest: Any) -> Launched:
            launched = launch(pieces, *rest)
            for sequence, row in zip(launched.sequences, launched.logits, strict=True):
                self.logits.setdefault(sequence.request.request_id, []).append(row.clone())
            return launched

        def forced(logits: torch.Tensor, rows: list[int], *rest: Any) -> Drawn:
            drawn = draw(logits, rows, *rest)
            names = {sequence.row: sequence.request.request_id for sequence in self.engine._scheduler.running}
            for at, row in enumerate(rows):
                if names[row] in self.forced:
                    drawn.tokens[at] = next(self.forced[names[row]], 0)
            return drawn

        runner.launch = recorded  # type: ignore[method-assign]
        runner.sampler.draw = forced  # type: ignore[method-assign]

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
        """[n, vocab]: logits of each token of the latest request, without those of a step past its end."""
        name = f"request-{self.count}"
        return torch.stack(self.logits[name][: len(self.answer(name).token_ids)])


def drive(
    mode: SharingMode, adapters: AdapterSet, *, steps: int = 7, seed: int = 0, **options: Any
) -> Iterator[tuple[Recorder, Chunk, int, list[int], list[int], torch.Tensor]]:
    """A trajectory of several turns by three roles. Yields what each turn's logits were and should be."""
    recorder = Recorder(tiny_engine(mode, adapters, **options))
    random = torch.Generator().manual_seed(seed)

    def fresh(count: int) -> list[int]:
        return torch.randint(3, 280, (count,), generator=random).tolist()

    ids = fresh(11)
    writers = [0 if mode.one_writer_per_token else 1] * 9  # elsewhere the role that asks first writes it all
    for step in range(steps):
        role = ROLES[(0, 1, 1, 2, 0, 2, 1)[step % 7]]
        index = ROLES.index(role) + 1
        position_roles = [("base", *ROLES)[w] for w in writers] + [role] * (len(ids) - len(writers))
        answer = recorder.ask(role, ids, 5, position_roles=position_roles, opening=2)
        writers += [index] * (len(ids) + 4 - len(writers))
        ids += answer.token_ids
        yield recorder, answer, index, list(ids[:-1]), list(writers), recorder.last_logits()
        ids += fresh((0, 6, 3, 0, 9, 1, 2)[step % 7]) + fresh(2)
