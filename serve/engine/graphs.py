"""Steps as CUDA graphs, captured before the first request: decode batches, and short appends among them.

A step of few tokens is some hundred launches of a few microseconds each; launched one by one they would take ten times
as long as the device needs. A graph is captured for each of a ladder of sizes, and a step runs in the smallest that
holds it. What a graph reads lies in static tensors, which the host fills before each replay.
"""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lragent.serve.engine.step import Step
from lragent.serve.engine.step_tensors import StepTensors

logger = logging.getLogger(__name__)

DECODE = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Sequences of one new token each."""
APPEND = (16, 32, 64, 128, 192, 256, 320, 384, 512, 640, 768, 1024)
"""New tokens, of as many sequences or fewer."""
LONG_APPEND, LONG_CONTEXT = 256, 32_768
"""More new tokens than this in a longer context than that are faster by cuDNN, which no graph can hold (its shapes
differ with every length), though the host launches everything one by one."""


@dataclass(frozen=True, order=True)
class Bucket:
    """The sizes of a graph: of tokens, of sequences, and of tokens that one sequence may have."""

    tokens: int
    sequences: int
    most_new: int

    def holds(self, step: Step) -> bool:
        """Whether a step fits."""
        fits = len(step.tokens) <= self.tokens and len(step.pieces) <= self.sequences
        if not fits or step.most_new > self.most_new:
            return False
        return step.most_new <= LONG_APPEND or int(step.context.max()) <= LONG_CONTEXT


def ladder(rows: int) -> list[Bucket]:
    """The sizes for at most `rows` sequences at once, the cheapest first."""
    decode = [count for count in DECODE if count < rows] + [rows]
    buckets = [Bucket(count, count, 1) for count in decode]
    return sorted(buckets + [Bucket(tokens, min(tokens, rows), tokens) for tokens in APPEND])


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    tensors: StepTensors
    logits: torch.Tensor


def _refuse_waiting(forward: Callable[[StepTensors, int], torch.Tensor], bucket: Bucket, device: torch.device) -> None:
    """Raises RuntimeError where `forward` waits for the device, which no graph can hold.

    Found out before anything is captured: a capture that fails leaves torch's random numbers unusable.
    """
    tensors = StepTensors.empty(bucket.tokens, bucket.sequences, device)
    forward(tensors, bucket.most_new)  # whatever is compiled or loaded the first time may wait
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it does not find all
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            forward(tensors, bucket.most_new)
        finally:
            torch.cuda.set_sync_debug_mode(before)


def _captured(
    forward: Callable[[StepTensors, int], torch.Tensor], bucket: Bucket, device: torch.device, pool: Any
) -> _Captured:
    tensors = StepTensors.empty(bucket.tokens, bucket.sequences, device)
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):  # compiles what is not compiled yet
        forward(tensors, bucket.most_new)
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
        logits = forward(tensors, bucket.most_new)
    return _Captured(graph, tensors, logits)


class StepGraphs:
    """The graphs of one engine. nobody: the row that tokens of nobody are drawn for."""

    def __init__(self, nobody: int) -> None:
        self._nobody = nobody
        self._captured: dict[Bucket, _Captured] = {}

    @torch.inference_mode()
    def capture(
        self,
        forward: Callable[[StepTensors, int], torch.Tensor],
        buckets: Sequence[Bucket],
        device: torch.device,
        tell: Callable[[Bucket], None],
    ) -> None:
        """Capture `forward`, which gives logits for static tensors and the most new tokens of a sequence.

        The largest first, so that the others find room in its memory. tell: called before each. Raises RuntimeError
        where no graph can hold it.
        """
        _refuse_waiting(forward, min(buckets), device)
        pool = torch.cuda.graph_pool_handle()
        gc.collect()
        gc.disable()  # a graph of an engine that is gone must not be freed while another is captured
        try:
            for bucket in sorted(buckets, reverse=True):
                tell(bucket)
                try:
                    self._captured[bucket] = _captured(forward, bucket, device, pool)
                except torch.OutOfMemoryError:
                    logger.warning(
                        "No memory is left for a CUDA graph of %d tokens: such steps are slow.", bucket.tokens
                    )
        finally:
            gc.enable()
        self._captured = dict(sorted(self._captured.items()))

    def run(self, step: Step) -> tuple[torch.Tensor | None, StepTensors | None]:
        """Logits [n, vocab] of a step, valid until the next one, and its tensors; None where no graph holds it."""
        for bucket, captured in self._captured.items():
            if bucket.holds(step):
                captured.tensors.fill(step, self._nobody)
                captured.graph.replay()
                return captured.logits[: len(step.keep)], captured.tensors
        return None, None
