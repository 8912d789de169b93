"""Tied adapters against PEFT's own forward, and the one-pass forward against the slow reference."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from reference import reference_logits
from tiny import make_adapter_set, tiny_config, tiny_model, tiny_tokenizer
from torch import nn
from transformers import LlamaForCausalLM

from lragent.adapter_set import AdapterSet
from lragent.attention import ATTENTION, PackedPass, register_attention
from lragent.errors import LRAgentError, UserError
from lragent.rope import rope_at
from lragent.routing import Route
from lragent.stacking import stack
from lragent.tied_lora import RoleModel, TiedLoraLinear, build_role_model, role_model_from

ROLES = ("plan", "action", "reflect")
each_family = pytest.mark.parametrize("family", ["llama", "qwen3"])  # the latter normalises keys after projection


def role_model(adapters: AdapterSet, **config: object) -> RoleModel:
    """A tiny model with these adapters in its tied modules."""
    model = tiny_model(**config)
    register_attention()
    model.set_attn_implementation(ATTENTION)
    first = adapters.roles[0]
    built = build_role_model(
        model, adapters.role_names, rank=first.rank, alpha=first.alpha, rslora=first.rslora, targets=adapters.targets
    )
    with torch.no_grad():
        for path, module in built.modules.items():
            module.shared_a.copy_(adapters.shared_a[path])
            for weight, b in zip(module.role_b, adapters.role_b[path], strict=True):
                weight.copy_(b)
    return built


def one_pass(built: RoleModel, ids: list[int], roles: list[int], split: frozenset[str]) -> torch.Tensor:
    """Logits [T, vocab] of one flat trajectory."""
    device = built.model.device
    positions = torch.arange(len(ids), device=device)
    route = Route.of(roles, device, split)
    rope = rope_at(built.model.get_base_model(), positions, torch.float32)
    with built.router.use(route):
        out = built.model(
            input_ids=torch.tensor([ids], device=device),
            position_ids=positions[None],
            attention_pass=PackedPass(((0, len(ids)),), route, rope),
            use_cache=False,
        )
    return out.logits[0]


def peft_logits(adapters: AdapterSet, role: int, ids: list[int], **config: object) -> torch.Tensor:
    """Plain PEFT, one untied adapter."""
    spec = adapters.roles[role - 1]
    lora = LoraConfig(r=spec.rank, lora_alpha=spec.alpha, use_rslora=spec.rslora, target_modules=list(adapters.targets))
    model = get_peft_model(tiny_model(**config), lora)
    with torch.no_grad():
        for path, module in model.get_base_model().named_modules():
            if path in adapters.shared_a:
                module.lora_A["default"].weight.copy_(adapters.shared_a[path])
                module.lora_B["default"].weight.copy_(adapters.role_b[path][role - 1])
        return model(input_ids=torch.tensor([ids])).logits[0]


def some_ids(count: int) -> list[int]:
    text = "the plan is to search and then to look at the rest of the story again, and act"
    ids: list[int] = tiny_tokenizer()(text).input_ids
    return ids[:count]


EVERY_TARGET = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), EVERY_TARGET], ids=["q,v", "all"])
@pytest.mark.parametrize("role", [1, 3])
@each_family
def test_one_role_everywhere_is_pefts_forward(family: str, targets: tuple[str, ...], role: int) -> None:
    adapters = make_adapter_set(tiny_model(family=family), ROLES, targets=targets)
    ids = some_ids(20)
    want = peft_logits(adapters, role, ids, family=family)
    built = role_model(adapters, family=family)
    with torch.no_grad():
        whole = one_pass(built, ids, [role] * len(ids), frozenset())
        # With one reader, the split form says the same.
        split = one_pass(built, ids, [role] * len(ids), built.split())
    torch.testing.assert_close(whole, want, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(split, want, atol=2e-5, rtol=1e-5)
    with torch.no_grad():
        base = tiny_model(family=family)(input_ids=torch.tensor([ids])).logits[0]
        assert (want - base).abs().max() > 0.05, "the adapters must matter"
        torch.testing.assert_close(one_pass(built, ids, [0] * len(ids), frozenset()), base, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(one_pass(built, ids, [0] * len(ids), built.split()), base, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj"), EVERY_TARGET], ids=len)
@each_family
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_mixed_roles_equal_the_reference(device: str, family: str, targets: tuple[str, ...]) -> None:
    adapters = make_adapter_set(tiny_model(family=family), ROLES, targets=targets)
    ids = some_ids(24)
    roles = [0] * 4 + [1] * 6 + [2] * 5 + [1] * 3 + [3] * 6
    built = role_model(adapters, family=family)
    built.model.to(device)
    with torch.no_grad():
        shared = one_pass(built, ids, roles, built.split())
        full = one_pass(built, ids, roles, frozenset())
    model = tiny_model(family=family)
    for got, mode in ((shared, "base_lr_shared"), (full, "full_shared")):
        want = reference_logits(model, adapters, ids, roles, mode)
        torch.testing.assert_close(got.cpu(), want, atol=5e-5, rtol=1e-4)
    assert (shared - full).abs().max() > 1e-3, "the reader's B must matter"


def test_the_references_modes_agree_for_one_role_and_with_peft() -> None:
    adapters = make_adapter_set(tiny_model(), ROLES, targets=("q_proj", "k_proj", "v_proj"))
    ids = some_ids(16)
    want = peft_logits(adapters, 2, ids)
    for mode in ("non_shared", "full_shared", "base_shared", "base_lr_shared"):
        got = reference_logits(tiny_model(), adapters, ids, [2] * 16, mode)
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)
    roles = [1] * 6 + [2] * 4 + [3] * 6
    results = [
        reference_logits(tiny_model(), adapters, ids, roles, mode)[6:]
        for mode in ("non_shared", "full_shared", "base_shared", "base_lr_shared")
    ]
    for i, one in enumerate(results):
        for other in results[i + 1 :]:
            assert (one - other).abs().max() > 1e-4, "the modes are four different computations"


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_the_reference_covers_biases_windows_and_norms_of_heads(family: str) -> None:
    """Mistral's window, Qwen2's biases and Qwen3's norms, against transformers' own forward."""
    model, ids = tiny_model(family=family), some_ids(16)
    with torch.no_grad():
        want = model(input_ids=torch.tensor([ids])).logits[0]
    got = reference_logits(model, make_adapter_set(model, ROLES), ids, [0] * 16, "base_lr_shared")
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj")], ids=["q,v", "q,k,v"])
@each_family
def test_gradients_equal_finite_differences(family: str, targets: tuple[str, ...]) -> None:
    adapters = make_adapter_set(tiny_model(family=family), ROLES, targets=targets)
    built = role_model(adapters, family=family)
    for path, module in list(built.model.named_modules()):
        if path.endswith("norm"):  # transformers' own norm computes in float32
            built.model.set_submodule(path, nn.RMSNorm(len(module.weight), eps=module.variance_epsilon))
    built.model.double()
    built.learn()
    ids, roles = some_ids(14), [0] * 3 + [1] * 4 + [2] * 4 + [3] * 3
    chosen = torch.randn(300, dtype=torch.float64)

    def loss() -> torch.Tensor:
        return (torch.log_softmax(one_pass(built, ids, roles, built.split()), -1) @ chosen).sum()

    built.check()
    loss().backward()
    for module in built.modules.values():
        for weight in (module.shared_a, module.role_b[0], module.role_b[2]):
            assert weight.grad is not None
            row, column = divmod(int(weight.grad.abs().argmax()), weight.shape[1])
            old, step = weight.data[row, column].item(), 1e-6
            ends = []
            for value in (old + step, old - step):
                weight.data[row, column] = value
                with torch.no_grad():
                    ends.append(loss().item())
            weight.data[row, column] = old
            assert weight.grad[row, column].item() == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-5)
            assert abs(weight.grad[row, column]) > 1e-3


def test_trajectories_in_one_batch_do_not_see_each_other() -> None:
    built = role_model(make_adapter_set(tiny_model(), ROLES))
    ids, roles = some_ids(20), [1] * 5 + [2] * 15
    positions = torch.tensor([*range(8), *range(12)])
    route = Route.of(roles, split=built.split())
    with torch.no_grad(), built.router.use(route):
        both = built.model(
            input_ids=torch.tensor([ids]),
            position_ids=positions[None],
            attention_pass=PackedPass(((0, 8), (8, 20)), route),
            use_cache=False,
        ).logits[0]
    with torch.no_grad():
        apart = [one_pass(built, ids[a:b], roles[a:b], built.split()) for a, b in ((0, 8), (8, 20))]
    torch.testing.assert_close(both, torch.cat(apart), atol=2e-5, rtol=1e-5)


def test_a_is_one_parameter_and_peft_cannot_freeze_it_unseen() -> None:
    model = tiny_model()
    built = build_role_model(model, ROLES, rank=4, alpha=8, targets=("q_proj", "v_proj"))
    names = [name for name, parameter in built.model.named_parameters() if parameter.requires_grad]
    assert len(names) == 4 * (1 + len(ROLES)), "two layers of two modules: one A and three B each"
    assert len(built.adapter_parameters()) == len(names)
    assert all(isinstance(module, TiedLoraLinear) for module in built.modules.values())
    built.model.set_adapter("action")
    with pytest.raises(LRAgentError, match=r"learn\(\)"):
        built.check()
    built.learn()
    module = built.modules["model.layers.1.self_attn.v_proj"]
    module.lora_A["action"] = nn.Linear(64, 4, bias=False).requires_grad_(True)
    with pytest.raises(LRAgentError, match="no longer tied"):
        built.check()


def learning(built: RoleModel) -> set[str]:
    """Names by what is said of them: A, or the role of a B."""
    names = [name for name, parameter in built.model.named_parameters() if parameter.requires_grad]
    return {"A" if ".lora_A." in name else name.split(".lora_B.")[1].split(".")[0] for name in names}


def test_what_learns_is_what_was_said() -> None:
    built = build_role_model(tiny_model(), ROLES, rank=4, alpha=8)
    assert learning(built) == {"A", *ROLES}
    built.learn(a=True, roles=["plan"])
    assert learning(built) == {"A", "plan"}
    built.learn(a=False, roles=["action", "reflect"])
    assert learning(built) == {"action", "reflect"}
    built.modules["model.layers.0.self_attn.q_proj"].shared_a.requires_grad_(True)
    with pytest.raises(LRAgentError, match=r"learns: call `learn\(\)`"):
        built.check()


def test_roles_of_any_rank_and_scaling_are_trained_on_as_they_are() -> None:
    """Three adapters of different ranks, alphas and modules, stacked: ranks differ by module then."""
    singles = [
        make_adapter_set(tiny_model(), [role], rank, targets, seed=rank)
        for role, rank, targets in (
            ("plan", 2, ("q_proj", "v_proj")),
            ("action", 5, ("v_proj",)),
            ("reflect", 3, ("q_proj", "k_proj", "v_proj")),
        )
    ]
    stacked = stack(singles)
    built = role_model_from(_attending(tiny_model()), stacked)
    assert [spec.name for spec in built.specs] == list(ROLES)
    ids = some_ids(16)
    roles = [0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 1, 1, 2, 2, 2, 3]
    with torch.no_grad():
        got = one_pass(built, ids, roles, built.split())
        alone = one_pass(built, ids, [2] * 16, frozenset())
    want = reference_logits(tiny_model(), stacked, ids, roles, "base_lr_shared")
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(
        alone, reference_logits(tiny_model(), singles[1], ids, [1] * 16, "non_shared"), atol=2e-5, rtol=1e-5
    )


def _attending(model: nn.Module) -> nn.Module:
    register_attention()
    model.set_attn_implementation(ATTENTION)
    return model


def test_adapters_of_another_shape_are_refused() -> None:
    adapters = make_adapter_set(tiny_model(), ROLES)
    with pytest.raises(UserError, match=r"model\.layers\.0\.self_attn\.q_proj"):
        role_model_from(tiny_model(hidden_size=32), adapters)


@pytest.mark.parametrize("target", ["v_proj", "down_proj"])
def test_a_may_start_along_the_strongest_directions(target: str) -> None:
    torch.manual_seed(0)
    plain = build_role_model(tiny_model(), ROLES, rank=3, alpha=4, targets=(target,))
    torch.manual_seed(0)
    built = build_role_model(tiny_model(), ROLES, rank=3, alpha=4, targets=(target,), a_init="svd")
    for path, module in built.modules.items():
        right = torch.linalg.svd(module.base_layer.weight.detach())[2][:3]
        a = module.shared_a.detach()
        torch.testing.assert_close(a.norm(), plain.modules[path].shared_a.detach().norm())
        cosines = torch.nn.functional.cosine_similarity(a, right).abs()
        torch.testing.assert_close(cosines, torch.ones(3), atol=1e-3, rtol=0)
        assert all(not b.any() for b in module.role_b)


def test_only_the_layers_asked_for_are_adapted() -> None:
    built = build_role_model(tiny_model(), ROLES, rank=2, alpha=4, targets=("q_proj",), layers=[1])
    assert list(built.modules) == ["model.layers.1.self_attn.q_proj"]


def test_float32_adapters_on_a_bf16_base_compute_in_bf16() -> None:
    register_attention()
    model = LlamaForCausalLM(tiny_config(attn_implementation=ATTENTION)).to(torch.bfloat16)
    built = build_role_model(model, ROLES, rank=4, alpha=8)
    assert {p.dtype for p in built.adapter_parameters()} == {torch.float32}
    ids, roles = some_ids(8), [1] * 4 + [2] * 4
    positions, route = torch.arange(8)[None], Route.of(roles, split=built.split())
    with built.router.use(route):
        out = built.model(
            input_ids=torch.tensor([ids]), position_ids=positions, attention_pass=PackedPass(((0, 8),), route),
            use_cache=False,
        )  # fmt: skip
    assert out.logits.dtype == torch.bfloat16
    out.logits.float().sum().backward()
    assert built.modules["model.layers.0.self_attn.v_proj"].role_b[1].grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"roles": ()}, "`roles` is empty"),
        ({"roles": ("plan", "plan")}, "twice"),
        ({"roles": ("base",)}, "base"),
        ({"targets": ("qproj",)}, "'qproj'"),
        ({"targets": ()}, "`targets` is empty"),
        ({"layers": [2]}, "layers 0 to 1"),
        ({"layers": []}, "`layers` is empty"),
    ],
)
def test_what_a_model_cannot_have_is_refused(change: dict[str, object], says: str) -> None:
    arguments: dict[str, object] = {"roles": ROLES, "targets": ("q_proj",), "layers": None} | change
    with pytest.raises(UserError, match=says):
        build_role_model(tiny_model(), rank=2, alpha=4, **arguments)  # type: ignore[arg-type]


def test_keys_normalised_in_a_way_of_their_own_cannot_be_split() -> None:
    built = build_role_model(tiny_model(family="gemma3"), ROLES, rank=2, alpha=4, targets=("k_proj", "v_proj"))
    with pytest.raises(UserError, match=r"k_proj, but model\.layers\.0\.self_attn\.k_norm \(Gemma3RMSNorm\)"):
        built.split()


def test_base_keys_are_kept_only_where_they_are_taken() -> None:
    """Or every layer's would stay in memory until the next pass."""
    for family, kept in (("llama", False), ("qwen3", True)):
        built = role_model(make_adapter_set(tiny_model(family=family), ROLES, targets=EVERY_TARGET), family=family)
        for path, module in built.modules.items():
            assert module.keeps_base == (kept and path.endswith("k_proj"))
        ids = some_ids(8)
        one_pass(built, ids, [1, 2] * 4, built.split())
        assert all(module._base is None and module._low is None for module in built.modules.values())
