"""Attention through the cache, by each of its ways, against the definition, which materialises what each reader
sees."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from caches import NAN, Cached, Case, make_cached, with_spans
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_close

from lragent.kernels.cached import CachedBatch, cached_attention_reference
from lragent.kernels.launch import kernel_arguments, padded
from lragent.kernels.ops import cached_attention, choose_way, make_plan
from lragent.kernels.plan import Plan, Sizes
from lragent.kernels.prefill import launch_prefill
from lragent.kernels.split import launch_split

CASES = {
    "decode": Case(new=(1, 1, 1), context=(33, 16, 1)),
    "append": Case(),
    "none_new": Case(new=(2, 0, 3), context=(20, 9, 17)),
    "whole_prompt": Case(new=(21,), context=(21,)),
    "block_and_one_more": Case(new=(8, 9, 1), context=(32, 33, 31)),
    "one_role_each": Case(mixed=False),
    "one_head_group": Case(group=1, kv_heads=3),
    "groups_of_three": Case(group=3, kv_heads=2, dim=24),
    "groups_of_seven": Case(group=7, kv_heads=1, dim=8),
    "no_lr_cache": Case(rank_v=0),
    "rank_1": Case(rank_v=1),
    "rank_20": Case(rank_v=20),
    "many_roles": Case(new=(12, 5), context=(20, 40), roles=40),
    "lr_apart": Case(apart=True),
    "by_token": Case(by_token=True),
    "window": Case(window=5),
    "window_of_one": Case(window=1),
    "window_wide": Case(window=100),
    "soft_cap": Case(softcap=1.5),
    "low_keys": Case(rank_k=4),
    "low_keys_alone": Case(rank_k=3, rank_v=0),
    "low_keys_one_role": Case(rank_k=4, mixed=False, apart=True),
    "low_keys_normalised": Case(rank_k=4, normalised=True),
    "low_keys_window": Case(rank_k=4, window=6, group=3, dim=24),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
SIZES = {
    "split": Sizes(16, 16, 4, 2, programs=7),
    "split_two_loops": Sizes(16, 16, 4, 2, programs=5, one_loop=False),
    "prefill": Sizes(16, 16, 4, 2),
}
each_kernel = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)


def run(made: Cached, case: Case, sizes: Sizes) -> torch.Tensor:
    """One kernel with these sizes, its output and scratch poisoned."""
    heads, kv_heads = made.query.shape[1], made.cache.key.shape[0]
    plan = Plan.empty(sizes, made.batch, heads, kv_heads, padded(case.dim), made.query.dtype)
    plan.part_out.fill_(NAN)
    plan.part_lse.fill_(NAN)
    plan.make(made.batch, heads, kv_heads, case.window)
    out = torch.full_like(made.query, NAN)
    arguments = kernel_arguments(*made.arguments, case.scale, case.window, case.softcap)
    (launch_split if sizes.programs else launch_prefill)(arguments, plan, out)
    return out


@each_kernel
@each_case
def test_float32(case: Case, sizes: Sizes, device: str) -> None:
    made = make_cached(case, torch.float32, device)
    expected = cached_attention_reference(*made.arguments, **case.options)
    assert_close(run(made, case, sizes), expected, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@each_kernel
@pytest.mark.parametrize("name", ["append", "low_keys", "low_keys_normalised", "many_roles"])
def test_half_precision(name: str, sizes: Sizes, dtype: torch.dtype, device: str) -> None:
    if dtype is torch.bfloat16 and device == "cpu":
        pytest.skip("Triton's interpreter multiplies bfloat16 wrongly")
    made = make_cached(CASES[name], dtype, device)
    expected = cached_attention_reference(*made.arguments, **CASES[name].options)
    assert_close(run(made, CASES[name], sizes), expected, dtype)


@given(
    sequences=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 70)), min_size=1, max_size=6),
    programs=st.integers(1, 12),
    group=st.integers(1, 3),
    window=st.none() | st.integers(1, 40),
)
@settings(max_examples=60, deadline=None)
def test_a_plan_gives_every_unit_to_one_program(
    device: str, sequences: list[tuple[int, int]], programs: int, group: int, window: int | None
) -> None:
    bm, bn, kv_heads = 16, 16, 2
    new, before = zip(*sequences, strict=True)
    starts = torch.tensor([0, *new]).cumsum(0).int()
    contexts = torch.tensor(new) + torch.tensor(before)
    rows = torch.arange(len(new)).int()
    table = torch.zeros(len(new), 80, dtype=torch.int32)
    roles = torch.zeros(sum(new), dtype=torch.int32)
    tensors = (t.to(device) for t in (starts, contexts.int(), rows, table, table, roles))
    batch = CachedBatch(*tensors, most_new=max(max(new), 1))
    plan = Plan.empty(Sizes(bm, bn, 4, 2, programs), batch, kv_heads * group, kv_heads, 16, torch.float32)
    plan.runs.fill_(-9)
    plan.make(batch, kv_heads * group, kv_heads, window)

    units = []  # every (sequence, first row, head, tile) that must be done, in order
    for s, (fresh, context) in enumerate(zip(new, contexts.tolist(), strict=True)):
        for row in range(0, fresh * group, bm):
            first = context - fresh + row // group
            last = context - fresh + (min(row + bm, fresh * group) - 1) // group
            least = 0 if window is None else max(first - window + 1, 0) // bn
            units += [(s, row, kv, tile) for kv in range(kv_heads) for tile in range(least, last // bn + 1)]
    blocks = sorted({unit[:2] for unit in units})
    assert plan.totals.tolist() == [len(units) // kv_heads, len(blocks)]
    at = 0
    for run_of in plan.runs.tolist():
        if run_of[0] == 0:
            continue
        s, row, kv, tile = units[at]
        index = blocks.index((s, row))
        assert run_of[1:4] == [index, kv, tile]
        assert run_of[4:14] == plan.blocks[index].tolist()
        assert run_of[4:9] == [starts[s], new[s], contexts[s], s, row]
        at += run_of[0]
    assert at == len(units)
    lengths = plan.runs[:, 0]
    assert lengths.max() - lengths.min() <= 1, "runs are of equal length"


@pytest.mark.parametrize("programs", [1, 3, 40])
def test_programs_do_not_matter(programs: int, device: str) -> None:
    case = Case(new=(1, 7, 2), context=(90, 60, 5), seed=3)
    made = make_cached(case, torch.float32, device)
    expected = cached_attention_reference(*made.arguments, **case.options)
    assert_close(run(made, case, Sizes(16, 16, 4, 2, programs)), expected, torch.float32)


@each_case
def test_the_definition_agrees_with_attention_over_plain_tensors(case: Case) -> None:
    """The definition itself, against the one of `kernels.attention`, where that takes the case."""
    if case.rank_k or case.softcap:
        pytest.skip("kernels.attention knows neither low-rank keys nor a soft cap")
    from lragent.kernels.attention import lora_attention_reference

    made = make_cached(case, torch.float32, "cpu")
    got = cached_attention_reference(*made.arguments, **case.options)
    starts = made.batch.query_start.tolist()
    for s, (context, row) in enumerate(zip(case.context, made.batch.rows.tolist(), strict=True)):
        part = slice(starts[s], starts[s + 1])
        slots, low_slots = made.batch.slots[row, :context].long(), made.batch.low_slots[row, :context].long()
        low = None if made.cache.low_v is None else made.cache.low_v[low_slots]
        expected = lora_attention_reference(
            made.query[part].transpose(0, 1), made.cache.key[:, slots], made.cache.value[:, slots], low,
            made.readers.up_v, made.batch.roles[part].long(), scale=case.scale, window=case.window,
        )  # fmt: skip
        assert_close(got[part], expected, torch.float32)


@pytest.mark.parametrize("way", ["split", "prefill", "torch"])
def test_the_public_function(way: str, device: str) -> None:
    case = Case(rank_v=8)
    made = make_cached(case, torch.float32, device)
    expected = cached_attention_reference(*made.arguments, **case.options)
    assert_close(cached_attention(*made.arguments, **case.options, way=way), expected, torch.float32)


def test_a_plan_serves_many_layers(device: str) -> None:
    case = Case()
    layers = [make_cached(replace(case, seed=0), torch.float32, device) for _ in range(2)]
    layers[1].query.mul_(2)
    plan = make_plan(layers[0].query, layers[0].cache, layers[0].batch, way="split")
    for layer in layers:
        got = cached_attention(*layer.arguments, **case.options, plan=plan)
        assert_close(got, cached_attention_reference(*layer.arguments, **case.options), torch.float32)


@pytest.mark.parametrize("way", ["split", "prefill", "torch"])
def test_nothing_to_do(way: str, device: str) -> None:
    made = make_cached(Case(new=(), context=()), torch.float32, device)
    assert cached_attention(*made.arguments, scale=1.0, way=way).shape == (0, 4, 16)
    made = make_cached(Case(new=(0, 0), context=(4, 2)), torch.float32, device)
    assert cached_attention(*made.arguments, scale=1.0, way=way).shape == (0, 4, 16)


def test_large_ranks_are_read_by_torch(device: str) -> None:
    made = make_cached(Case(rank_v=130), torch.float32, device)
    assert choose_way(made.query, made.cache, made.batch, None, None) == "torch"
    expected = cached_attention_reference(*made.arguments, scale=0.25)
    assert_close(cached_attention(*made.arguments, scale=0.25), expected, torch.float32)
    with pytest.raises(ValueError, match=r"ranks \[130\] are not for this way"):
        cached_attention(*made.arguments, scale=0.25, way="split")


WRONG = {
    "query: must be torch": lambda m: replace_query(m, m.query.double()),
    r"query: must have the shape \[T, Hq, D\]": lambda m: replace_query(m, m.query[0]),
    r"cache.key: must have the shape \[Hkv, slots, D\]": lambda m: replace_query(m, m.query[..., :8]),
    "query: its 3 heads must be a multiple": lambda m: replace_query(m, m.query[:, :3]),
    r"batch.roles: must have the shape \[T\]": lambda m: replace_query(m, m.query[:-1]),
    "cache.value: must be torch.float32": lambda m: change(m, "cache", value=m.cache.value.half()),
    "cache.key: its last dimension must be contiguous": lambda m: change(
        m, "cache", key=m.cache.key.transpose(1, 2).contiguous().transpose(1, 2)
    ),
    "readers.up_v: goes with cache.low_v": lambda m: change(m, "readers", up_v=None),
    r"readers.up_v: must have the shape \[n_roles, rv, 32\]": lambda m: change(
        m, "readers", up_v=m.readers.up_v[:, :2]
    ),
    "readers.rope: low-rank keys are rotated": lambda m: change(m, "readers", rope=None),
    "readers.rope: must have at least 64 positions": lambda m: change(
        m, "readers", rope=tuple(table[:63] for table in m.readers.rope)
    ),
    "readers.key_norm: raw keys": lambda m: change(
        change(m, "cache", low_k=None), "readers", up_k=None, key_norm=torch.ones(16, device=m.query.device)
    ),
    "batch.context: must be torch.int32": lambda m: change(m, "batch", context=m.batch.context.long()),
    r"batch.query_start: must have the shape \[4\]": lambda m: change(m, "batch", query_start=m.batch.query_start[:-1]),
    "batch.most_new: must be at least 1": lambda m: change(m, "batch", most_new=0),
}


def replace_query(made: Cached, query: torch.Tensor) -> Cached:
    return replace(made, query=query)


def change(made: Cached, part: str, **fields: object) -> Cached:
    return replace(made, **{part: replace(getattr(made, part), **fields)})


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_argument_is_named(message: str, device: str) -> None:
    made = make_cached(Case(rank_k=4), torch.float32, device)
    with pytest.raises(ValueError, match=message):
        cached_attention(*WRONG[message](made).arguments, scale=1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 0.0}, "scale: must be positive"),
        ({"scale": 1.0, "window": 0}, "window: must be at least 1"),
        ({"scale": 1.0, "softcap": -1.0}, "softcap: must be positive"),
        ({"scale": 1.0, "way": "expanded"}, "needs batch.spans"),
    ],
)
def test_a_wrong_option_is_named(options: dict, message: str, device: str) -> None:
    made = make_cached(Case(), torch.float32, device)
    with pytest.raises(ValueError, match=message):
        cached_attention(*made.arguments, **options)


# The kernels as they run on a GPU: real sizes, all dtypes.

GPU_CASES = {
    "decode": Case(new=(1,) * 5, context=(1000, 128, 129, 1, 64), kv_heads=8, group=4, dim=128, rank_v=8, mixed=False),
    "append": Case(new=(8, 1, 5), context=(700, 300, 5), kv_heads=8, group=4, dim=128, rank_v=16),
    "append_64": Case(new=(64, 3), context=(600, 130), kv_heads=8, group=4, dim=128, rank_v=8),
    "prompt": Case(new=(257, 128), context=(257, 500), kv_heads=2, group=4, dim=128, rank_v=8),
    "d64": Case(new=(1, 9, 70), context=(400, 129, 300), kv_heads=3, group=3, dim=64, rank_v=8),
    "d80": Case(new=(1, 9, 70), context=(400, 129, 300), kv_heads=2, group=4, dim=80, rank_v=5),
    "d96": Case(new=(1, 9, 70), context=(400, 129, 300), kv_heads=2, group=1, dim=96, rank_v=32),
    "d256": Case(new=(1, 9, 40), context=(400, 129, 300), kv_heads=2, group=2, dim=256, rank_v=8),
    "d256_r128": Case(new=(1, 9, 40), context=(400, 129, 300), kv_heads=1, group=8, dim=256, rank_v=128),
    "r1": Case(new=(1, 9, 70), context=(400, 129, 300), dim=64, rank_v=1),
    "r100": Case(new=(1, 9, 70), context=(400, 129, 300), dim=128, rank_v=100),
    "groups_of_seven": Case(new=(1, 9, 40), context=(400, 129, 300), kv_heads=4, group=7, dim=128, rank_v=8),
    "many_roles": Case(new=(1, 60, 70), context=(400, 129, 300), dim=64, rank_v=8, roles=256),
    "apart_by_token": Case(new=(1, 9, 70), context=(400, 129, 300), dim=128, apart=True, by_token=True),
    "window": Case(new=(1, 9, 170), context=(400, 129, 300), dim=128, window=100, rank_v=8),
    "soft_cap": Case(new=(1, 9, 70), context=(400, 129, 300), dim=128, softcap=30.0, rank_v=8),
    "low_keys": Case(new=(1, 9, 70), context=(400, 129, 300), kv_heads=8, group=4, dim=128, rank_v=8, rank_k=8),
    "low_keys_d64": Case(new=(1, 9, 33), context=(400, 129, 300), kv_heads=3, group=3, dim=64, rank_k=16),
    "low_keys_d80": Case(new=(1, 9, 33), context=(400, 129, 300), dim=80, rank_k=8, mixed=False),
    "low_keys_normalised": Case(
        new=(1, 9, 70), context=(400, 129, 300), kv_heads=8, group=4, dim=128, rank_v=8, rank_k=8, normalised=True
    ),
    "low_keys_window": Case(new=(1, 70), context=(400, 300), dim=128, rank_k=8, rank_v=0, window=90),
}
each_gpu_case = pytest.mark.parametrize("case", GPU_CASES.values(), ids=GPU_CASES)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("way", ["split", "prefill"])
@each_gpu_case
def test_on_a_gpu(case: Case, way: str, dtype: torch.dtype, seed: int) -> None:
    made = make_cached(replace(case, seed=seed), dtype, "cuda")
    expected = cached_attention_reference(*made.arguments, **case.options)
    assert_close(cached_attention(*made.arguments, **case.options, way=way), expected, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["prompt", "d64", "d80", "d96", "apart_by_token", "low_keys", "low_keys_normalised"])
def test_long_chunks_laid_out(name: str, dtype: torch.dtype) -> None:
    case = replace(GPU_CASES[name], mixed=False)
    made = make_cached(case, dtype, "cuda")
    # Three roles in the first sequence that has several tokens, and the base.
    s = next(i for i, n in enumerate(case.new) if n >= 8)
    start = int(made.batch.query_start[s])
    made.batch.roles[start : start + 7] = torch.tensor([1, 1, 0, 0, 2, 2, 3], dtype=torch.int32)
    batch = with_spans(made.batch)
    expected = cached_attention_reference(*made.arguments, **case.options)
    got = cached_attention(made.query, made.cache, batch, made.readers, **case.options, way="expanded")
    assert_close(got, expected, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("new", "context"), [(300, 5000), (257, 2305), (128, 4096), (2048, 4096), (2049, 2049)], ids=str
)
@pytest.mark.parametrize("rank_k", [0, 8], ids=["values", "low_keys"])
def test_long_chunks_after_a_long_context(new: int, context: int, rank_k: int) -> None:
    """Before, at and behind where the context is cut in two, and with two roles."""
    case = Case(
        new=(new,), context=(context,), kv_heads=2, group=2, dim=128, rank_v=8, rank_k=rank_k, roles=2, mixed=False
    )
    made = make_cached(case, torch.bfloat16, "cuda")
    made.batch.roles[: new // 2] = 1
    made.batch.roles[new // 2 :] = 2
    expected = cached_attention_reference(*made.arguments, **case.options)
    batch = with_spans(made.batch)
    got = cached_attention(made.query, made.cache, batch, made.readers, **case.options, way="expanded")
    assert_close(got, expected, torch.bfloat16)


LLAMA = {"kv_heads": 8, "group": 4, "dim": 128, "rank_v": 8, "mixed": False}
WAYS = [
    (Case(new=(1,), context=(5000,), **LLAMA), torch.bfloat16, "split"),
    (Case(new=(64,), context=(9000,), **LLAMA), torch.bfloat16, "split"),
    (Case(new=(2000,), context=(2000,), **LLAMA), torch.bfloat16, "prefill"),
    (Case(new=(8192,), context=(9000,), **LLAMA), torch.bfloat16, "expanded"),
    (Case(new=(8192,), context=(9000,), **LLAMA), torch.float32, "prefill"),
    (Case(new=(8192,), context=(9000,), **LLAMA, window=100), torch.bfloat16, "prefill"),
    (Case(new=(8192, 1), context=(9000, 50), **LLAMA), torch.bfloat16, "prefill"),
    (Case(dim=20, mixed=False), torch.bfloat16, "torch"),
    (Case(dim=264, mixed=False), torch.bfloat16, "torch"),
    (Case(rank_v=130, mixed=False), torch.bfloat16, "torch"),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("case", "dtype", "way"), WAYS, ids=[f"{i}_{way}" for i, (_, _, way) in enumerate(WAYS)])
def test_the_way_that_is_chosen(case: Case, dtype: torch.dtype, way: str) -> None:
    made = make_cached(case, dtype, "cuda")
    assert choose_way(made.query, made.cache, with_spans(made.batch), case.window, case.softcap) == way
    if way == "torch":
        expected = cached_attention_reference(*made.arguments, **case.options)
        assert_close(cached_attention(*made.arguments, **case.options), expected, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("new", [1, 8, 300])
def test_a_long_context(new: int) -> None:
    case = Case(new=(new,), context=(65_536,), kv_heads=8, group=4, dim=128, rank_v=8, mixed=False)
    made = make_cached(case, torch.bfloat16, "cuda")
    expected = cached_attention_reference(*made.arguments, **case.options)
    assert_close(cached_attention(*made.arguments, **case.options), expected, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["split", "prefill"])
def test_a_captured_graph_takes_new_lengths_and_roles(way: str) -> None:
    """Captured once for a bucket of tokens and sequences, replayed for others, with less of both."""
    shape = {"kv_heads": 8, "group": 4, "dim": 128, "rank_v": 8}
    biggest = Case(new=(4, 4, 4, 4), context=(900, 900, 900, 900), **shape)
    static = make_cached(biggest, torch.bfloat16, "cuda")
    out = torch.empty_like(static.query)

    def step() -> None:
        plan = make_plan(static.query, static.cache, static.batch, way=way)
        out.copy_(cached_attention(*static.arguments, **biggest.options, plan=plan))

    from lragent.bench.graphs import capture

    graph = capture(step)
    for seed, (new, context) in enumerate([((1, 4, 0, 3), (5, 900, 7, 64)), ((4, 4, 4, 4), (128, 129, 4, 600))]):
        case = Case(new=new, context=context, seed=seed, **shape)
        fresh = make_cached(case, torch.bfloat16, "cuda")
        tokens = sum(new)
        static.query[:tokens] = fresh.query
        static.batch.query_start.copy_(fresh.batch.query_start)
        static.batch.context.copy_(fresh.batch.context)
        static.batch.rows.copy_(fresh.batch.rows)
        static.batch.roles[:tokens] = fresh.batch.roles
        for row, length in zip(fresh.batch.rows.tolist(), context, strict=True):
            slots = fresh.batch.slots[row, :length].long()
            static.batch.slots[row, :length] = fresh.batch.slots[row, :length]
            static.cache.key[:, slots] = fresh.cache.key[:, slots]
            static.cache.value[:, slots] = fresh.cache.value[:, slots]
            static.cache.low_v[slots] = fresh.cache.low_v[slots]
        out.fill_(NAN)
        graph.replay()
        expected = cached_attention_reference(
            static.query[:tokens], static.cache, replace(static.batch, roles=static.batch.roles[:tokens]),
            static.readers, **case.options,
        )  # fmt: skip
        assert_close(out[:tokens], expected, torch.bfloat16)


@pytest.mark.gpu
def test_results_are_the_same_every_time() -> None:
    case = Case(new=(1, 8), context=(9000, 5000), kv_heads=8, group=4, dim=128, rank_v=8)
    made = make_cached(case, torch.bfloat16, "cuda")
    first = cached_attention(*made.arguments, **case.options, way="split")
    for _ in range(20):
        assert torch.equal(first, cached_attention(*made.arguments, **case.options, way="split"))
