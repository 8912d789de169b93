"""KL between sharing modes: where it must vanish, where it must not, and how it is summed up."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import reference_logits
from test_forced import ROLES, TEAM, example
from tiny import make_adapter_set, tiny_model

from lragent.adapter_set import AdapterSet
from lragent.eval.analysis.divergence import COMPARED, Divergence, divergences, examples_by_mode, records
from lragent.eval.analysis.forced import Forced
from lragent.modes import PrefixWriter, SharingMode
from lragent.train.data import Example

NAMES = ("base", *ROLES)
Q_V, Q_K_V = ("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj")


def first_writes(one: Example) -> Example:
    speaker = int(one.authors[one.authors > 0][0])
    return dataclasses.replace(one, roles=one.roles.where(one.roles > 0, speaker))


FIRST = [first_writes(one) for one in TEAM]


def compared(adapters: AdapterSet, examples: Any = FIRST) -> list[dict[SharingMode, Divergence]]:
    return list(divergences(Forced(tiny_model(), adapters), dict.fromkeys(SharingMode, examples)))


@pytest.mark.parametrize("targets", [Q_V, Q_K_V])
def test_it_is_the_divergence_of_the_references(targets: tuple[str, ...]) -> None:
    adapters = make_adapter_set(tiny_model(), ROLES, targets=targets)
    for one, found in zip(TEAM, compared(adapters, TEAM), strict=True):
        wanted = one.targets != -100
        ids, roles = one.token_ids.tolist(), one.roles.tolist()
        exact, *others = (
            torch.log_softmax(reference_logits(tiny_model(), adapters, ids, roles, mode.value)[wanted], -1)
            for mode in (SharingMode.NON_SHARED, *COMPARED)
        )
        for mode, other in zip(COMPARED, others, strict=True):
            want = F.kl_div(other, exact, reduction="none", log_target=True).sum(-1)
            torch.testing.assert_close(found[mode].kl, want, atol=1e-4, rtol=1e-3)
            assert torch.equal(found[mode].changed, exact.argmax(-1) != other.argmax(-1))
            assert torch.equal(found[mode].roles, one.loss_roles[wanted])


@pytest.mark.parametrize("targets", [Q_V, Q_K_V])
def test_roles_that_agree_lose_nothing_in_any_mode(targets: tuple[str, ...]) -> None:
    adapters = make_adapter_set(tiny_model(), ROLES, targets=targets)
    alike = {path: b[:1].expand_as(b).contiguous() for path, b in adapters.role_b.items()}
    adapters = dataclasses.replace(adapters, role_b=alike)
    for found in compared(adapters):
        assert all(float(found[mode].kl.max()) < 1e-5 for mode in COMPARED)
    # A prefix by the base is another's hand, even for roles that agree.
    assert all(float(found[mode].kl.max()) > 1e-4 for found in compared(adapters, TEAM) for mode in COMPARED)


def test_one_role_alone_loses_nothing() -> None:
    solo = [example(4, [0] * 3 + [1] * 4 + [0] * 2 + [1] * 3)]
    adapters = make_adapter_set(tiny_model(), ("solo",))
    (found,) = compared(adapters, [first_writes(solo[0])])
    assert all(float(found[mode].kl.max()) < 1e-5 and not found[mode].changed.any() for mode in COMPARED)


def test_roles_that_change_no_value_lose_as_much_in_every_mode_but_differ() -> None:
    """With queries adapted only, nothing is left to decompose: all shared modes are one, and still not exact."""
    for found in compared(make_adapter_set(tiny_model(), ROLES, targets=("q_proj",))):
        full, base, base_lr = (found[mode].kl for mode in COMPARED)
        torch.testing.assert_close(full, base_lr, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(base, base_lr, atol=1e-5, rtol=1e-4)
        assert full.max() > 1e-4


def test_the_first_turn_is_exact_where_its_role_writes_the_prefix() -> None:
    for found in compared(make_adapter_set(tiny_model(), ROLES)):
        for mode in COMPARED:
            first = found[mode].turns == 0
            assert float(found[mode].kl[first].max()) < 1e-5
            assert float(found[mode].kl[~first].max()) > 1e-3


@pytest.mark.parametrize("writer", list(PrefixWriter))
def test_the_base_writes_prefixes_where_the_engine_lets_it(writer: PrefixWriter) -> None:
    by_writer = {PrefixWriter.FIRST: FIRST, PrefixWriter.BASE: list(TEAM)}
    got = examples_by_mode(by_writer.__getitem__, writer)
    assert got[SharingMode.NON_SHARED] is got[SharingMode.BASE_SHARED] is FIRST
    assert got[SharingMode.FULL_SHARED] is got[SharingMode.BASE_LR_SHARED] is by_writer[writer]


Drawn = list[list[tuple[float, bool, int, int]]]
DRAWN = st.lists(
    st.lists(
        st.tuples(st.floats(0, 20, width=32), st.booleans(), st.integers(1, 3), st.integers(0, 4)),
        min_size=1,
        max_size=12,
    ),
    min_size=1,
    max_size=6,
)


@given(DRAWN)
@settings(max_examples=40, deadline=None)
def test_parts_add_up_to_the_whole(drawn: Drawn) -> None:
    found = []
    for one in drawn:
        kl, changed, roles, turns = (torch.tensor(column) for column in zip(*one, strict=True))
        found.append(dict.fromkeys(COMPARED, Divergence(kl, changed, roles, turns)))
    made = records(found, NAMES, "here")
    assert json.loads(json.dumps(made)) == made
    rows = [row for row in made if row["mode"] == "full_shared"]
    (whole,) = (row for row in rows if row["role"] == "all" and row["step"] is None)
    values = [kl for one in drawn for kl, *_ in one]
    assert whole["targets"] == len(values)
    assert whole["trajectories"] == len(drawn)
    assert whole["kl"] == pytest.approx(sum(values) / len(values))
    assert whole["median"] <= whole["p99"] <= max(values) + 1e-6
    by_role = [row for row in rows if row["role"] != "all"]
    by_step = [row for row in rows if row["step"] is not None]
    for parts in (by_role, by_step):
        for figure in ("kl", "changed"):
            total = sum(row[figure] * row["targets"] for row in parts)
            assert total == pytest.approx(whole[figure] * whole["targets"], abs=1e-6)
    if len(drawn) == 1:
        assert whole["interval"] is None
    else:
        low, high = whole["interval"]
        means = [sum(kl for kl, *_ in one) / len(one) for one in drawn]
        assert min(means) - 1e-6 <= low <= high <= max(means) + 1e-6


def test_the_interval_holds_the_mean_of_many_alike() -> None:
    random = torch.Generator().manual_seed(1)
    found = []
    for _ in range(50):
        kl = torch.rand(8, generator=random)
        found.append(dict.fromkeys(COMPARED, Divergence(kl, kl > 2, torch.ones(8).long(), torch.zeros(8).long())))
    low, high = records(found, NAMES, "here")[0]["interval"]
    assert low < 0.5 < high
    assert high - low == pytest.approx(2 * 1.96 * (1 / 12 / 400) ** 0.5, rel=0.3)
