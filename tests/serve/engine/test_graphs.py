"""Which graph a step runs in. On a GPU test_kernel_pass and test_ahead hold graphs to eager steps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from engines import Recorder, tiny_engine
from hypothesis import given
from hypothesis import strategies as st

from lragent.serve.engine.graphs import LONG_APPEND, LONG_CONTEXT, Bucket, ladder
from lragent.serve.engine.step_tensors import StepTensors


def step(*pieces: tuple[int, int]) -> Any:
    """A step of pieces of (new tokens, context)."""
    sizes = [new for new, _ in pieces]
    total = sum(sizes)
    return SimpleNamespace(
        pieces=pieces,
        tokens=np.arange(100, 100 + total, dtype=np.int32),
        positions=np.arange(total, dtype=np.int32),
        roles=np.full(total, 2, np.int32),
        base_slots=np.arange(total, dtype=np.int32) + 7,
        low_slots=np.arange(total, dtype=np.int32) + 9,
        query_start=np.array([0, *np.cumsum(sizes)], np.int32),
        context=np.array([context for _, context in pieces], np.int32),
        rows=np.arange(len(pieces), dtype=np.int32)[::-1],
        keep=np.array([total - 1], np.int32),
        drawn_rows=np.array([3], np.int32),
        most_new=max(sizes),
    )


def first(rows: int, wanted: Any) -> Bucket | None:
    return next((bucket for bucket in ladder(rows) if bucket.holds(wanted)), None)


def test_the_smallest_that_holds_a_step_is_taken() -> None:
    assert first(8, step((1, 500))) == Bucket(1, 1, 1)
    assert first(8, step(*[(1, 9)] * 5)) == Bucket(8, 8, 1)
    assert first(8, step((9, 70_000))) == Bucket(16, 8, 16)
    assert first(8, step(*[(1, 9)] * 7, (9, 50))) == Bucket(16, 8, 16)
    assert first(8, step((1025, 2000))) is None
    assert first(8, step((LONG_APPEND + 1, LONG_CONTEXT + 1))) is None
    assert first(8, step((LONG_APPEND + 1, LONG_CONTEXT))) is not None


@given(st.integers(1, 300))
def test_every_number_of_decoding_sequences_has_a_graph(rows: int) -> None:
    for count in {1, (rows + 1) // 2, rows}:
        found = first(rows, step(*[(1, 10)] * count))
        assert found is not None
        assert count <= found.tokens <= max(16, 2 * count)


@pytest.mark.parametrize(("tokens", "sequences"), [(5, 2), (8, 3), (16, 16)])
def test_what_a_step_does_not_fill_belongs_to_nobody(tokens: int, sequences: int) -> None:
    tensors = StepTensors.empty(tokens, sequences, torch.device("cpu"))
    tensors.fill(step((8, 40), (8, 90)) if tokens == 16 else step((3, 40), (1, 90)), nobody=11)
    for filled in (step((3, 40), (2, 90)), step((4, 20))):  # what was there before must not be left
        tensors.fill(filled, nobody=11)
        total, count = len(filled.tokens), len(filled.pieces)
        for name in ("tokens", "positions", "roles", "base_slots", "low_slots"):
            assert getattr(tensors, name)[:total].tolist() == getattr(filled, name).tolist()
        assert tensors.base_slots[total:].tolist() == tensors.low_slots[total:].tolist() == [-1] * (tokens - total)
        assert tensors.roles[total:].tolist() == [0] * (tokens - total)
        assert tensors.query_start.tolist() == [*filled.query_start.tolist(), *[total] * (sequences - count)]
        assert tensors.context.tolist() == [*filled.context.tolist(), *[0] * (sequences - count)]
        assert tensors.keep.tolist() == [total - 1, *[0] * (sequences - 1)]
        assert tensors.drawn_rows.tolist() == [3, *[11] * (sequences - 1)]
    assert all(getattr(tensors, name).data_ptr() % 16 == 0 for name in ("tokens", "roles", "query_start", "rows"))


@pytest.mark.gpu
def test_a_model_that_no_graph_can_hold_runs_without(caplog: pytest.LogCaptureFixture) -> None:
    """Angles that depend on the longest position ask the device for it."""
    scaled = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}}
    ids = list(range(20, 50))
    answers = []
    for graphs in (False, True):
        recorder = Recorder(tiny_engine("base_lr_shared", device="cuda", graphs=graphs, model_options=scaled))
        answers.append(recorder.ask("plan", ids, 6).token_ids)
    assert answers[0] == answers[1]
    assert "No CUDA graphs" in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("graphs", [False, True])
def test_the_second_gpu_answers_as_the_first(graphs: bool) -> None:
    """Streams, events and graphs belong to a device; torch takes the first where nobody says."""
    answers = []
    for device in ("cuda:0", "cuda:1"):
        recorder = Recorder(tiny_engine("base_lr_shared", device=device, graphs=graphs))
        names = [recorder.submit(role, list(range(20 + at, 50)), 12) for at, role in enumerate(("plan", "action"))]
        recorder.finish()
        answers.append([recorder.answer(name).token_ids for name in names])
    assert answers[0] == answers[1]
