"""Stacked adapters compute what each adapter computes alone, and come apart again bit for bit."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_adapter_set, tiny_model

from lragent.adapter_set import AdapterSet, RoleSpec, tensor_bytes
from lragent.errors import UserError
from lragent.stacking import as_tied, stack, unstack

TARGETS = ("q_proj", "k_proj", "v_proj")


@st.composite
def adapters_alone(draw) -> list[AdapterSet]:
    """Two to four independent roles over the same three modules of two layers: any subset, rank, scaling, dtype."""
    d_in, d_out = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    paths = [f"model.layers.{i}.self_attn.{t}" for i in range(2) for t in TARGETS]
    singles = []
    for index in range(draw(st.integers(2, 4))):
        chosen = sorted(draw(st.sets(st.sampled_from(paths), min_size=1)))
        rank = draw(st.integers(1, 4))
        dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
        pattern = draw(st.dictionaries(st.sampled_from(chosen), st.integers(1, 4), max_size=2))
        ranks = {path: pattern.get(path, rank) for path in chosen}
        random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
        singles.append(
            AdapterSet(
                base_model="tiny",
                base_fingerprint=draw(st.sampled_from([None, "ab" * 32])),
                form="tied",
                targets=tuple(t for t in TARGETS if any(p.endswith(t) for p in chosen)),
                roles=(
                    RoleSpec(
                        f"role{index}",
                        alpha=draw(st.floats(-8, 8)),
                        rank=rank,
                        rslora=draw(st.booleans()),
                        rank_pattern={p: r for p, r in ranks.items() if r != rank},
                        alpha_pattern=draw(st.dictionaries(st.sampled_from(chosen), st.floats(-8, 8), max_size=2)),
                    ),
                ),
                shared_a={p: torch.randn(ranks[p], d_in, generator=random).to(dtype) for p in chosen},
                role_b={p: torch.randn(1, d_out, ranks[p], generator=random).to(dtype) for p in chosen},
            )
        )
    return singles


@given(adapters_alone())
@settings(max_examples=60, deadline=None)
def test_each_role_keeps_its_own_output(singles):
    stacked = stack(singles)
    assert stacked.form == "stacked"
    for index, single in enumerate(singles):
        role = single.roles[0]
        for path in stacked.module_paths:
            x = torch.randn(5, stacked.shared_a[path].shape[1], dtype=torch.float64)
            got = x @ stacked.shared_a[path].double().T @ stacked.role_b[path][index].double().T
            if path not in single.shared_a:
                assert not got.any()
                assert not stacked.scaled_b(path)[index].any()
                continue
            assert stacked.roles[index].scaling(path) == role.scaling(path)
            alone = x @ single.shared_a[path].double().T @ single.role_b[path][0].double().T
            torch.testing.assert_close(got, alone, atol=1e-12, rtol=1e-12)
            scaled = x.float() @ stacked.shared_a[path].float().T @ stacked.scaled_b(path)[index].T
            torch.testing.assert_close(scaled, (alone * role.scaling(path)).float(), atol=1e-4, rtol=1e-4)


@given(adapters_alone())
@settings(max_examples=60, deadline=None)
def test_unstacking_gives_the_originals(singles):
    stacked = stack(singles)
    for single, again in zip(singles, unstack(stacked), strict=True):
        assert again.roles == single.roles
        assert (again.form, again.targets) == ("tied", single.targets)
        assert set(again.module_paths) == set(single.module_paths)
        for path in single.module_paths:
            assert torch.equal(again.shared_a[path], single.shared_a[path].to(stacked.dtype))
            assert torch.equal(again.role_b[path], single.role_b[path].to(stacked.dtype))


@given(adapters_alone())
@settings(max_examples=60, deadline=None)
def test_made_tied_for_healing_it_computes_the_same(singles):
    stacked = stack(singles)
    tied = as_tied(stacked)
    assert tied.form == "tied"
    assert as_tied(tied) is tied
    for path in stacked.module_paths:
        assert all(role.rank_of(path) == stacked.rank(path) for role in tied.roles)
        torch.testing.assert_close(tied.scaled_b(path), stacked.scaled_b(path), atol=1e-6, rtol=1e-6)


def test_ranks_add_up_and_rows_lie_one_after_another():
    model = tiny_model()
    singles = [
        make_adapter_set(model, ["plan"], rank=4, seed=1),
        make_adapter_set(model, ["action"], rank=2, targets=("v_proj",), seed=2),
        make_adapter_set(model, ["reflect"], rank=3, targets=("v_proj", "o_proj"), seed=3),
    ]
    stacked = stack(singles)
    q, v, o = (f"model.layers.1.self_attn.{t}_proj" for t in "qvo")
    assert [stacked.rank(p) for p in (q, v, o)] == [4, 9, 3]
    assert [dict(role.rows).get(v) for role in stacked.roles] == [(0, 4), (4, 6), (6, 9)]
    assert [dict(role.rows).get(q) for role in stacked.roles] == [(0, 4), None, None]
    assert stacked.targets == ("q_proj", "v_proj", "o_proj")
    assert [stacked.role_digest(n) for n in stacked.role_names] == [s.role_digest(s.role_names[0]) for s in singles]


def test_a_tied_set_also_comes_apart():
    tied = make_adapter_set(tiny_model())
    alone = unstack(tied)
    assert [s.role_names for s in alone] == [("plan",), ("action",), ("reflect",)]
    for i, single in enumerate(alone):
        for path in tied.module_paths:
            assert tensor_bytes(single.shared_a[path]) == tensor_bytes(tied.shared_a[path])
            assert torch.equal(single.role_b[path][0], tied.role_b[path][i])


def test_what_cannot_be_stacked_is_named():
    model = tiny_model()
    plan, action = (make_adapter_set(model, [name], seed=i) for i, name in enumerate(("plan", "action")))
    with pytest.raises(UserError, match="'plan' is used twice"):
        stack([plan, plan])
    with pytest.raises(UserError, match=r"'plan' and 'action' were made for different bases"):
        stack([dataclasses.replace(plan, base_fingerprint="a"), dataclasses.replace(action, base_fingerprint="b")])
    with pytest.raises(UserError, match=r"disagree about the size of model\.layers\.0"):
        stack([plan, make_adapter_set(tiny_model(num_key_value_heads=4), ["action"])])
    with pytest.raises(ValueError, match="one role each"):
        stack([make_adapter_set(model)])
