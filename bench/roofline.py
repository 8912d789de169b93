"""What a trajectory takes at least: bytes that must be read and operations that must be done, at measured rates.

A step of the model reads every weight but the embedding table once (of that it reads a row a token), and the keys and
values of all sequences in its batch; its products take `2 * parameters` operations a token, those of the head only for
tokens that are sampled from, and attention four per query and key and dimension. The adapters' own weights and caches
are left out: they are less than one percent. A step takes the longer of the two times.

For one trajectory nothing is faster than that. Many at once are taken to go in lockstep, each step of the model serving
all of them; an engine that computes prompts in the shadow of reading for others' tokens may pass this by a little.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from lragent.bench.graphs import microseconds
from lragent.bench.traces import Planned, Work, trace_work
from lragent.modes import SharingMode


@dataclass(frozen=True)
class Ceilings:
    """copy: bytes a second, read and written; products: operations a second."""

    copy: float
    products: float

    @classmethod
    def measure(cls, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Ceilings:
        """The faster of torch's two ways to copy, and a product of random square matrices.

        1 GiB and 8192 rows on a GPU; 128 MiB, which leaves the caches too, and 1024 rows on a CPU.
        """
        large = device.type == "cuda"
        source = torch.randn((1 << (30 if large else 27)) // dtype.itemsize, device=device).to(dtype)
        target = torch.empty_like(source)
        moved = 2 * source.numel() * source.element_size()
        clock = microseconds if large else _microseconds_on_cpu
        times = [clock(lambda: target.copy_(source)), clock(lambda: torch.mul(source, 1, out=target))]
        rows = 8192 if large else 1024
        left, right = (torch.randn(rows, rows, device=device).to(dtype) for _ in range(2))
        product = clock(lambda: torch.mm(left, right))
        return cls(moved / min(times) * 1e6, 2 * rows**3 / product * 1e6)


def _microseconds_on_cpu(run: Callable[[], object], times: int = 7) -> float:
    run()
    measured = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        measured.append(time.perf_counter() - start)
    return statistics.median(measured) * 1e6


@dataclass(frozen=True)
class ModelSize:
    """The sizes of a decoder with a gated MLP. itemsize: bytes of a weight and of a cached number."""

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    itemsize: int

    @classmethod
    def of(cls, config: Any, dtype: torch.dtype) -> ModelSize:
        """From a transformers config."""
        text = config.get_text_config()
        heads = int(text.num_attention_heads)
        return cls(
            layers=int(text.num_hidden_layers),
            hidden=int(text.hidden_size),
            inner=int(text.intermediate_size),
            heads=heads,
            kv_heads=int(getattr(text, "num_key_value_heads", None) or heads),
            head_dim=int(getattr(text, "head_dim", None) or text.hidden_size // heads),
            vocabulary=int(text.vocab_size),
            itemsize=dtype.itemsize,
        )

    @property
    def kv_parameters(self) -> int:
        """Of the projections to keys and values, all layers."""
        return self.layers * 2 * self.hidden * self.kv_heads * self.head_dim

    @property
    def layer_parameters(self) -> int:
        """Of all projections and MLPs, all layers, norms and biases left out."""
        attention = 2 * self.hidden * self.heads * self.head_dim
        return self.layers * (attention + 3 * self.hidden * self.inner) + self.kv_parameters

    @property
    def head_parameters(self) -> int:
        """Of the head, which may be the embedding table."""
        return self.vocabulary * self.hidden

    @property
    def read_bytes(self) -> int:
        """Weights that each step reads."""
        return (self.layer_parameters + self.head_parameters) * self.itemsize

    @property
    def kv_bytes(self) -> int:
        """Keys and values of one token."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.itemsize

    def attention_operations(self, new: int, context: int) -> float:
        """Of `new` tokens that see `context` tokens before them, and one another causally."""
        pairs = new * context + new * (new + 1) / 2
        return 4.0 * self.layers * self.heads * self.head_dim * pairs


@dataclass(frozen=True)
class Floor:
    """What a run of trajectories takes at least, in seconds.

    ttft_sum_s: a trajectory's times to first token, added up, as if it were alone: among many, whoever is served first
    waits for nobody. gap_s: the median time between two tokens. total_s: all of it.
    """

    ttft_sum_s: float
    gap_s: float
    total_s: float


@dataclass(frozen=True)
class Roofline:
    """The floors of one model on one machine."""

    size: ModelSize
    ceilings: Ceilings

    def decode_s(self, context: int, sequences: int = 1) -> float:
        """One step that gives `sequences` sequences their next token, each reading `context` tokens."""
        size = self.size
        operations = 2.0 * (size.layer_parameters + size.head_parameters) + size.attention_operations(1, context - 1)
        return self._longer(sequences * operations, size.read_bytes + sequences * size.kv_bytes * context)

    def prefill_operations(self, work: Work) -> float:
        """Of one prompt: all products for tokens that are new, all but those of keys and values for an LR prefill."""
        size = self.size
        products = work.full * size.layer_parameters + work.lr_only * (size.layer_parameters - size.kv_parameters)
        attention = size.attention_operations(work.full + work.lr_only, work.start)
        return 2.0 * (products + size.head_parameters) + attention

    def prefill_s(self, work: Work, sequences: int = 1) -> float:
        """The first tokens of `sequences` such prompts."""
        size = self.size
        read = size.read_bytes + sequences * size.kv_bytes * work.prompt
        return self._longer(sequences * self.prefill_operations(work), read)

    def trace(self, trace: Sequence[Planned], mode: SharingMode, trajectories: int = 1, concurrent: int = 1) -> Floor:
        """`trajectories` like `trace`, `concurrent` at a time, in lockstep: each model step serves all of them."""
        works = trace_work(trace, mode)
        full_waves, rest = divmod(trajectories, concurrent)
        first = self._wave(works, concurrent if full_waves else rest)
        last = self._wave(works, rest).total_s if rest and full_waves else 0.0
        return Floor(first.ttft_sum_s, first.gap_s, max(1, full_waves) * first.total_s + last)

    def _wave(self, works: Sequence[Work], together: int) -> Floor:
        alone, prefill = (sum(self.prefill_s(work, count) for work in works) for count in (1, together))
        gaps = [self.decode_s(work.prompt + given, together) for work in works for given in range(1, work.answer)]
        return Floor(alone, statistics.median(gaps) if gaps else 0.0, prefill + sum(gaps))

    def _longer(self, operations: float, read: float) -> float:
        return max(operations / self.ceilings.products, read / self.ceilings.copy)

    def facts(self) -> dict[str, Any]:
        """The ceilings and sizes, to be saved."""
        return {"ceilings": asdict(self.ceilings), "size": asdict(self.size)}
