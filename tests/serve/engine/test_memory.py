"""How many slots the cache gets: of a GPU's memory, of a CPU's, or as asked."""

from __future__ import annotations

from types import SimpleNamespace

import psutil
import pytest
import torch

from lragent.errors import UserError
from lragent.modes import SharingMode
from lragent.serve.cache.pools import CachePools, CacheShape
from lragent.serve.engine.memory import GpuMemory, cache_slots, slot_bytes, step_limits

LLAMA_8B = CacheShape(layers=32, kv_heads=8, head_dim=128, rank_v=8)
GIB = 2**30
CUDA, CPU = torch.device("cuda"), torch.device("cpu")
H100 = GpuMemory(total=80 * GIB, free=62 * GIB, kept=2 * GIB)


def on_gpu(monkeypatch: pytest.MonkeyPatch, memory: GpuMemory = H100) -> None:
    monkeypatch.setattr(GpuMemory, "now", classmethod(lambda cls, device: memory))


def slots(sharing: SharingMode = SharingMode.BASE_LR_SHARED, device: torch.device = CUDA, **options) -> int:  # type: ignore[no-untyped-def]
    return cache_slots(LLAMA_8B, torch.bfloat16, device, sharing=sharing, context=131_072, **options)


@pytest.mark.parametrize("mode", list(SharingMode))
@pytest.mark.parametrize("paged", [False, True])
def test_a_slot_takes_what_the_pools_take(mode: SharingMode, paged: bool) -> None:
    shape = CacheShape(2, 2, 16, rank_v=8 if mode.decomposed else 0)
    if paged != (mode is SharingMode.BASE_SHARED):
        return
    pools = CachePools(shape, 10, torch.float32, "cpu", paged=paged)
    assert pools.base_bytes + pools.lr_bytes == 10 * slot_bytes(shape, torch.float32, mode)


def test_weights_cache_and_activations_stay_within_the_share(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu(monkeypatch)
    got = slots(utilization=0.9, activations=3 * GIB)
    used = 80 * GIB - 62 * GIB - 2 * GIB
    total = used + got * (131_072 + 512) + 3 * GIB
    assert 0.9 * 80 * GIB - 131_584 < total <= 0.9 * 80 * GIB
    assert slots(utilization=0.5, activations=3 * GIB) < got
    assert slots(SharingMode.BASE_SHARED, activations=3 * GIB) > got, "LR entries take slots there, not memory beside"


def test_what_others_use_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu(monkeypatch, GpuMemory(80 * GIB, 10 * GIB, 0))
    assert slots() == 2 * GIB // 131_584


def test_too_little_names_the_flag_and_the_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu(monkeypatch, GpuMemory(80 * GIB, 5 * GIB, 0))
    with pytest.raises(UserError, match=r"--gpu-memory-utilization: 0\.9 of 80\.0 GiB .* 75\.0 GiB .*raise it"):
        slots()
    with pytest.raises(UserError, match=r"--max-tokens-in-cache: 50000 tokens take 6\.1 GiB.*ask for fewer"):
        slots(asked=50_000)
    assert slots(asked=30_000) == 30_000


def test_slots_are_numbered_in_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu(monkeypatch, GpuMemory(4000 * GIB, 4000 * GIB, 0))
    assert LLAMA_8B.lr_per_slot == 256
    assert slots(SharingMode.BASE_SHARED) * 256 < 2**31


def test_a_cpu_gets_a_share_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    def free(size: int) -> None:
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=size))

    free(1000 * GIB)
    assert slots(device=CPU) == 131_072, "at least one context"
    assert cache_slots(LLAMA_8B, torch.float32, CPU, sharing=SharingMode.NON_SHARED, context=2048) == 65_536
    free(4 * GIB)
    assert slots(device=CPU) == GIB // 131_584
    free(1000)
    with pytest.raises(UserError, match="--max-tokens-in-cache"):
        slots(device=CPU)
    with pytest.raises(UserError, match=r"^--max-tokens-in-cache: 77 tokens do not fit into the free memory; 0 would"):
        slots(device=CPU, asked=77)
    free(4 * GIB)
    assert slots(device=CPU, asked=77) == 77


def test_every_sequence_has_a_token_of_a_step() -> None:
    assert step_limits(CUDA, None, None) == (64, 8192)
    assert step_limits(CPU, None, None) == (16, 512)
    assert step_limits(CPU, 1000, None) == (1000, 1000)
    assert step_limits(CPU, 8, 8) == (8, 8)
    with pytest.raises(
        UserError, match=r"^--max-num-batched-tokens: must be at least --max-num-seqs, which is 16, not 8"
    ):
        step_limits(CPU, 16, 8)
    assert step_limits(CPU, None, 8) == (8, 8)
