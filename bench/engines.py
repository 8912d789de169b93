"""Engines to be measured: one per sharing mode, built from one model. All that this folder knows of building them."""

from __future__ import annotations

import asyncio
import copy
import gc
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lragent.adapter_set import AdapterSet
from lragent.attention import ATTENTION, register_attention
from lragent.bench.clients import InProcess
from lragent.bench.playing import Load, Played, play
from lragent.bench.shapes import Shape, random_model, stand_in_tokenizer
from lragent.bench.traces import Planned, random_roles, team
from lragent.errors import UserError
from lragent.models import fingerprint, load_model, load_tokenizer, resolve_model
from lragent.modes import SharingMode
from lragent.pack import read_pack
from lragent.serve.engine.build import build_engine, cache_shape, split_kinds
from lragent.serve.engine.chat import ChatPrompts
from lragent.serve.engine.service import EngineService
from lragent.serve.engine.types import EngineDeadError

GPU_RESERVE = 5 << 30
"""Bytes that no cache takes: what steps compute with, and what CUDA graphs hold."""
PAGES = 64
"""Slots that hold LR entries in part, at most."""
CPU_SHARE = 0.5
"""Of the memory that is free: the most that a cache takes. Others live there too."""


class NoRoomError(UserError):
    """The cache asked for does not fit beside what is in memory already."""


@dataclass(frozen=True)
class Base:
    """What every engine is built from: a shape with random weights, or a model and perhaps a pack.

    shape: None where `model` says which. rank: of random roles.
    """

    device: torch.device
    dtype: torch.dtype
    shape: Shape | None = None
    model: str | None = None
    pack: Path | None = None
    rank: int = 8
    positions: int = 0

    def load(self) -> PreTrainedModel:
        """The model without roles."""
        register_attention()
        if self.shape is not None:
            return random_model(
                self.shape, self.device, self.dtype, positions=self.positions, attn_implementation=ATTENTION
            )
        return load_model(resolve_model(self.model), self.dtype, self.device, attn_implementation=ATTENTION)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's own, or one that has a word for each id."""
        if self.shape is not None:
            return stand_in_tokenizer(self.shape.vocabulary)
        return load_tokenizer(resolve_model(self.model))

    def roles(self, model: PreTrainedModel, count: int) -> AdapterSet:
        """Random ones, or the pack's. Raises UserError where it has too few."""
        if self.pack is None:
            return random_roles(model, team(count), self.rank)
        adapters = read_pack(self.pack, expect_fingerprint=fingerprint(resolve_model(self.model).path))
        if len(adapters.roles) < count:
            raise UserError(f"--pack: {self.pack} holds {len(adapters.roles)} roles; {count} are to play.")
        return adapters


@dataclass(frozen=True)
class EngineOptions:
    """slots: tokens that the cache is wanted to hold; positions: the longest sequence; token_budget: tokens a step."""

    slots: int
    positions: int
    sequences: int
    token_budget: int | None = None


@dataclass(frozen=True)
class Memory:
    """Bytes. base, lr: of the cache's slots in use at their peak. other: what the device held beside weights and cache
    at its peak; None on a CPU. reserved: the whole cache."""

    weights: int
    base: int
    lr: int
    other: int | None
    reserved: int


@dataclass(frozen=True)
class Counters:
    """Of the cache and the scheduler, during one run."""

    preempted: int = 0
    base_evicted: int = 0
    lr_evicted: int = 0


class MeasuredEngine:
    """A running engine in one sharing mode. `role_names` are those of its roles that take part."""

    def __init__(
        self,
        base: Base,
        model: PreTrainedModel,
        mode: SharingMode,
        roles: int,
        options: EngineOptions,
        strict: bool = False,
    ) -> None:
        """`model` is changed in place. A cache that does not fit is made as large as fits; if `strict`, NoRoomError is
        raised instead."""
        self.mode = mode
        adapters = base.roles(model, roles)
        self.role_names = adapters.role_names[:roles]
        shape = cache_shape(model, adapters, split_kinds(adapters, mode))
        fitting = cache_room(base.device) // (shape.base_bytes(base.dtype) + shape.lr_bytes(base.dtype))
        if strict and fitting < options.slots:
            raise NoRoomError(f"a cache of {options.slots} tokens does not fit; {fitting} do.")
        wanted = options.slots
        if mode is SharingMode.BASE_SHARED:  # LR entries lie in slots too
            wanted += options.slots * roles // shape.lr_per_slot + PAGES
        self.slots = min(wanted, fitting)
        self._device = base.device
        before = self._allocated() - _weight_bytes(model)
        engine = build_engine(
            model,
            base.tokenizer(),
            adapters,
            sharing=mode,
            max_model_len=options.positions,
            cache_tokens=self.slots,
            max_num_seqs=options.sequences,
            token_budget=options.token_budget,
        )
        self._engine = engine
        self._service = _Service(engine, _NoChats(), [], "bench")
        self.vocabulary = int(model.config.get_text_config().vocab_size)
        self._weights = _weight_bytes(model)
        # What an engine holds beside weights and pools: graphs and buffers.
        self._buffers = max(0, self._allocated() - before - self._weights - self._reserved)
        self._peak_base = self._peak_lr = self._idle = 0
        self._counted = Counters()
        self.client = InProcess(self._service, self._watch)
        self._service.start()

    @property
    def _reserved(self) -> int:
        memory = self._engine.cache.memory()
        return memory.base_total + (0 if self._engine.cache.own_residuals else memory.lr_total)

    def _watch(self) -> None:
        """In the engine's thread, with every chunk: how full the cache is."""
        memory = self._engine.cache.memory()
        self._peak_base = max(self._peak_base, memory.base_used)
        self._peak_lr = max(self._peak_lr, memory.lr_used)

    @property
    def name(self) -> str:
        """What its rows are called."""
        return str(self.mode)

    def play(self, trace: Sequence[Planned], load: Load, *, seed: int, progress: Callable[[], None]) -> Played:
        """See lragent.bench.playing.play."""
        return asyncio.run(play(self.client, trace, load, vocabulary=self.vocabulary, seed=seed, progress=progress))

    def begin(self) -> None:
        """A run begins: the cache is emptied, and what is counted counts from here."""
        self._service.between_steps(self._engine.cache.clear)
        self._peak_base = self._peak_lr = 0
        self._counted = self._counters()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            self._idle = self._allocated()

    def memory(self) -> Memory:
        """At the peak since `begin`."""
        other = None
        if self._device.type == "cuda":
            other = self._buffers + torch.cuda.max_memory_allocated(self._device) - self._idle
        return Memory(self._weights, self._peak_base, self._peak_lr, other, self._reserved)

    def counters(self) -> Counters:
        """Since `begin`."""
        now, then = self._counters(), self._counted
        return Counters(
            now.preempted - then.preempted,
            now.base_evicted - then.base_evicted,
            now.lr_evicted - then.lr_evicted,
        )

    def host_share(self) -> float | None:
        """The part of all steps' time in which a GPU waited for the host between two of them."""
        stats = self._service.stats()
        whole = stats.device_busy_s + stats.device_idle_s
        return stats.device_idle_s / whole if whole else None

    def _counters(self) -> Counters:
        stats = self._service.stats()
        return Counters(stats.preempted, stats.base_evicted, stats.lr_evicted)

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated(self._device) if self._device.type == "cuda" else 0

    def close(self) -> None:
        """End the engine's thread and let go of its memory, which `free_memory` then gives back."""
        self._service.stop(drain=False)
        del self._engine, self._service, self.client


class _Service(EngineService):
    """Lets a benchmark act between two steps."""

    def between_steps(self, action: Callable[[], None]) -> None:
        """Run `action` in the engine's thread, and wait for it."""
        done = threading.Event()

        def act() -> None:
            action()
            done.set()

        self._inbox.put(act)
        while not done.wait(1.0):
            if not self.alive:
                raise EngineDeadError(f"The engine has failed: {self.failure}.")


class _NoChats(ChatPrompts):
    """Prompts are token ids here: no chat template is needed, and a shape has none."""

    def __init__(self) -> None:
        pass


def same_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Another model over the same tensors: roles can be installed in each, and the weights are held once."""
    memo: dict[int, object] = {}
    for weight in model.parameters():
        memo[id(weight)] = nn.Parameter(weight.data, requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer
    twin: PreTrainedModel = copy.deepcopy(model, memo)
    return twin


def free_memory(device: torch.device) -> None:
    """Give back what closed engines held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def cache_room(device: torch.device) -> int:
    """Bytes that a cache may take now."""
    if device.type == "cuda":
        return max(0, torch.cuda.mem_get_info(device)[0] - GPU_RESERVE)
    return int(psutil.virtual_memory().available * CPU_SHARE)


def _weight_bytes(model: nn.Module) -> int:
    """Of parameters and buffers, the roles' among them; what two names share is counted once."""
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensors.values())
