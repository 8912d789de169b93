"""CUDA graphs for measurements: many small launches without the host between them."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch


def capture(step: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """Run `step` once to compile what it launches, then capture it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def microseconds(run: Callable[[], object], times: int = 15) -> float:
    """The median time of `run` on the device, by events."""
    run()
    measured = []
    for _ in range(times):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        measured.append(start.elapsed_time(end) * 1e3)
    return statistics.median(measured)
