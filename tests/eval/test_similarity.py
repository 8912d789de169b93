"""Cosines of roles' caches against plain ones."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_forced import ROLES, TEAM
from tiny import make_adapter_set, tiny_model

from lragent.adapter_set import AdapterSet
from lragent.eval.analysis.forced import Forced, LayerCaches
from lragent.eval.analysis.similarity import Similarity

NAMES = ("base", *ROLES)
Q_V, Q_K_V = ("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj")


def measured(adapters: AdapterSet) -> list[dict[str, Any]]:
    forced = Forced(tiny_model(), adapters)
    similarity = Similarity(forced.names)
    for example in TEAM:
        forced.caches(example, similarity.add)
    return similarity.records("here")


def cosines(records: list[dict[str, Any]]) -> dict[tuple[int, str, str, str], float]:
    return {(record["layer"], record["what"], *record["pair"]): record["cosine"] for record in records}


def random_caches(length: int, seed: int) -> LayerCaches:
    random = torch.Generator().manual_seed(seed)
    shapes = {"key": (5, length, 8), "value": (5, length, 8), "low_k": (5, length, 3), "low_v": (5, length, 3)}
    shapes |= {"up_k": (3, 3, 8), "up_v": (3, 3, 8)}
    return LayerCaches(**{name: torch.randn(shape, generator=random) for name, shape in shapes.items()})


def test_every_figure_is_the_mean_over_all_tokens() -> None:
    parts = [random_caches(length, seed) for seed, length in enumerate((3, 11))]
    similarity = Similarity(NAMES)
    for caches in parts:
        similarity.add(7, caches)
    got = cosines(similarity.records("here"))

    def mean(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
        return float(torch.cat([F.cosine_similarity(a, b, dim=-1) for a, b in pairs]).mean())

    def full(caches: LayerCaches, stream: int, role: int) -> torch.Tensor:
        added = caches.low_v[stream] @ caches.up_v[role - 1] if role else 0  # type: ignore[index]
        return caches.value[stream] + added

    want = {
        (7, "key", "base", "reflect"): mean([(c.key[0], c.key[3]) for c in parts]),
        (7, "V_base", "plan", "shared"): mean([(c.value[1], c.value[4]) for c in parts]),
        (7, "LR cache", "base", "shared"): mean([(c.low_v[0], c.low_v[4]) for c in parts]),  # type: ignore[index]
        (7, "full V", "base", "plan"): mean([(full(c, 0, 0), full(c, 1, 1)) for c in parts]),
        (7, "full V", "action", "reflect"): mean([(full(c, 2, 2), full(c, 3, 3)) for c in parts]),
        (7, "full V", "action", "shared"): mean([(full(c, 2, 2), full(c, 4, 2)) for c in parts]),
    }
    for kind, low, up in (("adapter output", "low_v", "up_v"), ("key adapter output", "low_k", "up_k")):
        for name, stream, role in (("reflect", 3, 3), ("shared", 4, 1)):
            want[7, kind, "plan", name] = mean(
                [
                    (getattr(c, low)[1] @ getattr(c, up)[0], getattr(c, low)[stream] @ getattr(c, up)[role - 1])
                    for c in parts
                ]
            )
    for at, cosine in want.items():
        assert got[at] == pytest.approx(cosine, abs=1e-5), at
    assert (7, "adapter output", "base", "plan") not in got, "base has none"
    assert (7, "full V", "base", "shared") not in got, "what base reads there is V_base"


def test_records_are_plain_and_whole() -> None:
    records = measured(make_adapter_set(tiny_model(), ROLES, targets=Q_V))
    assert json.loads(json.dumps(records)) == records
    assert {record["what"] for record in records} == {"key", "V_base", "full V", "adapter output", "LR cache"}
    assert {record["layer"] for record in records} == {0, 1}
    assert {record["tokens"] for record in records} == {
        sum(int((one.targets != -100).nonzero()[-1]) + 1 for one in TEAM)
    }
    assert all(-1 <= record["cosine"] <= 1 + 1e-6 for record in records)
    got = cosines(records)
    # All streams bring the same tokens to the first layer; its A is one for all, its B is each role's own.
    for what in ("key", "V_base", "LR cache"):
        assert got[0, what, "plan", "action"] == pytest.approx(1, abs=1e-5)
        assert got[1, what, "plan", "action"] < 0.999
    assert got[0, "adapter output", "plan", "action"] < 0.9
    assert got[0, "adapter output", "plan", "shared"] == pytest.approx(1, abs=1e-5)


def test_roles_that_agree_leave_the_same_caches() -> None:
    """And what they share differs from it by the base's prefix only, which all roles would have written otherwise."""
    adapters = make_adapter_set(tiny_model(), ROLES, targets=Q_K_V)
    alike = {path: b[:1].expand_as(b).contiguous() for path, b in adapters.role_b.items()}
    got = cosines(measured(dataclasses.replace(adapters, role_b=alike)))
    among = {at: cosine for at, cosine in got.items() if "base" not in at and "shared" not in at}
    assert {at[1] for at in among} >= {"key LR cache", "key adapter output"}
    assert all(cosine == pytest.approx(1, abs=1e-5) for cosine in among.values())
    assert got[1, "full V", "base", "plan"] < 0.99
    assert got[1, "V_base", "plan", "shared"] < 0.99999


def test_where_values_are_not_adapted_full_values_are_the_bases() -> None:
    got = cosines(measured(make_adapter_set(tiny_model(), ROLES, targets=("q_proj",))))
    assert {at[1] for at in got} == {"key", "V_base", "full V"}
    assert all(cosine == got[layer, "V_base", a, b] for (layer, what, a, b), cosine in got.items() if what == "full V")
