"""Floors are those that one works out by hand, and models of a shape are as large as their roofline thinks."""

from __future__ import annotations

import pytest
import torch

from lragent.bench.roofline import Ceilings, ModelSize, Roofline
from lragent.bench.shapes import SHAPES, random_model, shape_config, stand_in_tokenizer
from lragent.bench.traces import Planned, Work, paper_trace, trace_tokens
from lragent.modes import SharingMode

SIZE = ModelSize(layers=2, hidden=4, inner=8, heads=2, kv_heads=1, head_dim=2, vocabulary=10, itemsize=2)


def slow_products(rate: float = 1.0) -> Roofline:
    """Every floor is its operations over `rate`."""
    return Roofline(SIZE, Ceilings(copy=1e30, products=rate))


def slow_copy(rate: float = 1.0) -> Roofline:
    """Every floor is its bytes over `rate`."""
    return Roofline(SIZE, Ceilings(copy=rate, products=1e30))


def test_sizes() -> None:
    # q 4x4, k and v 4x2 each, o 4x4, three of 4x8; twice.
    assert SIZE.layer_parameters == 2 * (16 + 8 + 8 + 16 + 96) == 288
    assert SIZE.kv_parameters == 32
    assert SIZE.head_parameters == 40
    assert SIZE.read_bytes == 2 * 328
    assert SIZE.kv_bytes == 2 * 2 * 1 * 2 * 2 == 16


def test_attention_counts_pairs_of_tokens() -> None:
    # Three tokens after five see 6, 7 and 8; two products of 2 * 2 operations a dimension, 2 layers of 4 dimensions.
    assert SIZE.attention_operations(3, 5) == (6 + 7 + 8) * 4 * 2 * 4


def test_a_decode_step() -> None:
    assert slow_copy(4.0).decode_s(100, 3) == (656 + 3 * 16 * 100) / 4
    assert slow_products(2.0).decode_s(100, 3) == 3 * (2 * 328 + 100 * 32) / 2


def test_a_prefill() -> None:
    work = Work("plan", prompt=20, full=3, lr_only=5, answer=1)
    assert work.start == 12
    pairs = sum(range(13, 21))
    products = 2 * (3 * 288 + 5 * (288 - 32) + 40)
    assert slow_products().prefill_s(work) == products + pairs * 32
    assert slow_products().prefill_s(work, 2) == 2 * slow_products().prefill_s(work)
    assert slow_copy().prefill_s(work, 2) == 656 + 2 * 16 * 20


def test_the_longer_time_counts() -> None:
    work = Work("plan", prompt=20, full=20, lr_only=0, answer=1)
    both = Roofline(SIZE, Ceilings(1.0, 1.0))
    assert both.prefill_s(work) == max(slow_copy().prefill_s(work), slow_products().prefill_s(work))


def test_a_trace_is_its_prefills_and_decode_steps() -> None:
    roofline = slow_copy()
    trace = [Planned("plan", 10, 3), Planned("action", 2, 2)]
    floor = roofline.trace(trace, SharingMode.BASE_LR_SHARED)
    prefills = (656 + 160) + (656 + 16 * 15)
    gaps = [656 + 16 * 11, 656 + 16 * 12, 656 + 16 * 16]
    assert (floor.ttft_sum_s, floor.gap_s, floor.total_s) == (prefills, gaps[1], prefills + sum(gaps))


def test_many_at_once_read_the_weights_together() -> None:
    roofline, trace = slow_copy(), [Planned("plan", 10, 3)]
    mode = SharingMode.FULL_SHARED
    assert roofline.trace(trace, mode, 2, 2).total_s == 3 * 656 + 2 * 16 * (10 + 11 + 12)
    one, two = roofline.trace(trace, mode), roofline.trace(trace, mode, 2, 2)
    assert two.ttft_sum_s == one.ttft_sum_s == 656 + 160
    assert two.gap_s == 656 + 2 * 16 * 11.5
    assert roofline.trace(trace, mode, 5, 2).total_s == 2 * two.total_s + one.total_s
    assert roofline.trace(trace, mode, 1, 4) == one


def test_modes_differ_in_what_they_compute() -> None:
    roofline = slow_products()
    times = {mode: roofline.trace(paper_trace(64), mode).ttft_sum_s for mode in SharingMode}
    assert times[SharingMode.BASE_LR_SHARED] == times[SharingMode.FULL_SHARED]
    assert times[SharingMode.BASE_LR_SHARED] < times[SharingMode.BASE_SHARED] < times[SharingMode.NON_SHARED]


def test_the_eight_billion_shape_has_the_floors_that_were_published_for_it() -> None:
    size = ModelSize.of(shape_config(SHAPES["llama-3.1-8b"]), torch.bfloat16)
    roofline = Roofline(size, Ceilings(3.0e12, 790e12))
    floors = [round(1e3 * roofline.decode_s(context), 2) for context in (1024, 8192)]
    assert floors == [5.05, 5.36]
    assert trace_tokens(paper_trace(16_384)) == 66_448


@pytest.mark.parametrize("name", ["tiny", *(name for name in SHAPES if name != "tiny")])
def test_a_shapes_size_is_its_models(name: str) -> None:
    shape = SHAPES[name]
    model = random_model(shape, torch.device("meta"), torch.bfloat16, positions=200_000)
    size = ModelSize.of(model.config, torch.bfloat16)
    matrices = sum(p.numel() for path, p in model.named_parameters() if p.dim() == 2)
    embedding = 0 if shape.tied else shape.vocabulary * shape.hidden  # not read, unless it is the head
    assert size.layer_parameters + size.head_parameters == matrices - embedding
    assert (model.dtype, model.config.max_position_embeddings) == (torch.bfloat16, 200_000)


def test_a_random_model_is_no_constant() -> None:
    model = random_model(SHAPES["tiny"], torch.device("cpu"), torch.float32)
    weight = model.get_parameter("model.layers.1.mlp.up_proj.weight")
    assert 0.01 < float(weight.detach().std()) < 0.04
    logits = model(torch.arange(8).unsqueeze(0)).logits
    assert bool(logits.isfinite().all())


def test_ceilings_are_measured() -> None:
    ceilings = Ceilings.measure(torch.device("cpu"), torch.float32)
    assert ceilings.copy > 1e8
    assert ceilings.products > 1e8


def test_the_stand_in_tokenizer_decodes_every_id() -> None:
    assert stand_in_tokenizer(300).decode([0, 5, 299]) == "w0w5w299"
