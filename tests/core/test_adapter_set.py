"""Names, digests and validity of the roles in memory."""

import dataclasses
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import make_adapter_set, tiny_model

from lragent.adapter_set import AdapterSet, UnknownBaseWarning, check_role_name
from lragent.errors import UserError

Q0 = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def adapters() -> AdapterSet:
    return make_adapter_set(tiny_model())


def change_role(adapters: AdapterSet, name: str, /, **changes: object) -> AdapterSet:
    roles = tuple(dataclasses.replace(r, **changes) if r.name == name else r for r in adapters.roles)
    return dataclasses.replace(adapters, roles=roles)


def change_tensor(adapters: AdapterSet, which: str, path: str, index: tuple[int, ...]) -> AdapterSet:
    tensors = {p: t.clone() for p, t in getattr(adapters, which).items()}
    tensors[path][index] += 1
    return dataclasses.replace(adapters, **{which: tensors})


def test_scaled_b_applies_each_roles_own_scaling(adapters):
    adapters = change_role(adapters, "plan", alpha=2.0)
    adapters = change_role(adapters, "action", rslora=True, alpha_pattern={Q0: 6.0})
    b = adapters.role_b[Q0]
    assert torch.equal(adapters.scaled_b(Q0), torch.stack([b[0] * 0.5, b[1] * 3.0, b[2] * 2.0]))
    assert adapters.roles[1].scaling("model.layers.1.self_attn.q_proj") == 8.0 / 4**0.5


def test_role_index_names_the_roles_there_are(adapters):
    assert adapters.role_index("reflect") == 2
    with pytest.raises(UserError, match=r"'judge'.*plan, action, reflect"):
        adapters.role_index("judge")


def test_shared_a_is_counted_once(adapters):
    a = sum(t.numel() for t in adapters.shared_a.values()) * 4
    b = sum(t.numel() for t in adapters.role_b.values()) * 4
    assert adapters.nbytes() == a + b
    assert adapters.separate_nbytes() == 3 * a + b


@pytest.mark.parametrize(
    "change",
    [
        lambda s: change_tensor(s, "shared_a", Q0, (0, 0)),
        lambda s: change_tensor(s, "role_b", Q0, (0, 0, 0)),
        lambda s: change_role(s, "plan", alpha=9.0),
        lambda s: change_role(s, "plan", rslora=True),
        lambda s: change_role(s, "plan", alpha_pattern={Q0: 9.0}),
        lambda s: dataclasses.replace(s, base_fingerprint="0" * 64),
        lambda s: make_adapter_set(tiny_model(), targets=("q_proj",)),
        lambda s: make_adapter_set(tiny_model(), dtype=torch.bfloat16),
    ],
    ids=["A", "B", "alpha", "rslora", "alpha_pattern", "base", "targets", "dtype"],
)
def test_role_digest_changes_with_what_the_role_computes(adapters, change):
    assert change(adapters).role_digest("plan") != adapters.role_digest("plan")


def test_role_digest_ignores_names_and_other_roles(adapters):
    renamed = change_role(adapters, "plan", name="judge")
    assert renamed.role_digest("judge") == adapters.role_digest("plan")
    other = change_role(change_tensor(adapters, "role_b", Q0, (1, 0, 0)), "reflect", alpha=1.0)
    assert other.role_digest("plan") == adapters.role_digest("plan")
    assert other.role_digest("action") != adapters.role_digest("action")
    reordered = dataclasses.replace(
        adapters, shared_a=dict(reversed(adapters.shared_a.items())), role_b=dict(reversed(adapters.role_b.items()))
    )
    assert reordered.role_digest("plan") == adapters.role_digest("plan")


def test_a_digest_covers_all_of_a_and_nothing_of_b(adapters):
    assert change_tensor(adapters, "role_b", Q0, (0, 0, 0)).a_digest() == adapters.a_digest()
    for path in adapters.module_paths:
        assert change_tensor(adapters, "shared_a", path, (-1, -1)).a_digest() != adapters.a_digest()


def test_a_stacked_role_keeps_the_digest_it_had_alone():
    model = tiny_model()
    alone = make_adapter_set(model, ["plan"], seed=1)
    stacked = make_adapter_set(model, ["plan", "action"], seed=0, tied=False)
    assert stacked.role_digest("plan") == alone.role_digest("plan")
    assert stacked.separate_nbytes() < stacked.nbytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"roles": ()}, "at least one role"),
        ({"form": "loose"}, "tied or stacked"),
        ({"form": "stacked"}, "rows of A belong to stacked"),
        ({"objective": "fun"}, "objective"),
        ({"prefix_writer": "last"}, "prefix_writer"),
        ({"targets": ("q_proj",)}, "do not agree"),
        ({"targets": ("q_proj", "v_proj", "lm_head")}, "'lm_head' cannot be adapted"),
        ({"shared_a": {}}, "at least one adapted module"),
        ({"role_b": {}}, "without role B"),
    ],
)
def test_what_does_not_fit_is_named(adapters, changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(adapters, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "base"}, "model without an adapter"),
        ({"name": "action"}, "twice"),
        ({"name": "a/b"}, "not allowed"),
        ({"rank": 5}, "has rank 5"),
        ({"rank": 0}, "below 1"),
        ({"alpha": float("nan")}, "not a finite number"),
        ({"alpha_pattern": {"nowhere": 1.0}}, "nowhere"),
        ({"rows": {Q0: (0, 4)}}, "only to those"),
    ],
)
def test_what_is_wrong_with_a_role_is_named(adapters, changes, message):
    with pytest.raises(UserError, match=message):
        change_role(adapters, "plan", **changes)


def test_wrong_shapes_dtypes_and_values_are_named(adapters):
    b = adapters.role_b[Q0]
    for wrong in (b[:2], b[..., :3], b[0], b.double()):
        with pytest.raises(UserError, match=r"layers.0.self_attn.q_proj"):
            dataclasses.replace(adapters, role_b={**adapters.role_b, Q0: wrong})
    wrong = b.clone()
    wrong[1, 0, 0] = float("inf")
    with pytest.raises(UserError, match=r"'action'.*NaN or Inf"):
        dataclasses.replace(adapters, role_b={**adapters.role_b, Q0: wrong}).check_finite()


def test_stacked_rows_are_checked():
    stacked = make_adapter_set(tiny_model(), ["plan", "action"], tied=False)
    rows = dict(stacked.roles[0].rows)
    with pytest.raises(UserError, match="not zero outside its rows"):
        change_role(stacked, "plan", rows={**rows, Q0: (4, 8)})
    for wrong in [(0, 3), (-1, 3), (6, 10)]:
        with pytest.raises(UserError, match=r"rows \["):
            change_role(stacked, "plan", rows={**rows, Q0: wrong})
    with pytest.raises(UserError, match="adapts no module"):
        change_role(stacked, "plan", rows={})


def test_another_base_is_refused_and_an_unknown_one_warned_about(adapters):
    with pytest.warns(UnknownBaseWarning, match="on trust"):
        adapters.check_base("ab" * 32)
    known = dataclasses.replace(adapters, base_fingerprint="cd" * 32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        known.check_base("cd" * 32)
        known.check_base(None)
    with pytest.raises(UserError, match="another base"):
        known.check_base("ab" * 32)


@given(st.text(max_size=80))
def test_role_names_are_safe_as_file_names(name):
    try:
        check_role_name(name)
    except UserError:
        return
    assert 1 <= len(name) <= 64
    assert name != "base"
    assert name.isascii()
    assert name.replace("-", "").replace("_", "").isalnum()
