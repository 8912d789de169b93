"""The losses of flat batches against PEFT, the slow reference and plain cross-entropy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from reference import reference_logits
from tiny import make_adapter_set, tiny_model
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig, LlamaConfig, OPTConfig

from lragent.adapter_set import AdapterSet
from lragent.attention import ATTENTION, register_attention
from lragent.tied_lora import RoleModel, build_role_model
from lragent.train import role_loss
from lragent.train.batches import pack
from lragent.train.data import Example, RoleViews
from lragent.train.role_loss import RoleLoss, loss_inputs

ROLES = ("plan", "action", "reflect")


def build(adapters: AdapterSet, family: str = "llama") -> RoleModel:
    register_attention()
    model = tiny_model(family=family)
    model.set_attn_implementation(ATTENTION)
    first = adapters.roles[0]
    built = build_role_model(
        model, adapters.role_names, rank=first.rank, alpha=first.alpha, targets=adapters.targets, dropout=0.3
    )
    with torch.no_grad():
        for path, module in built.modules.items():
            module.shared_a.copy_(adapters.shared_a[path])
            for weight, b in zip(module.role_b, adapters.role_b[path], strict=True):
                weight.copy_(b)
    built.model.eval()  # no dropout
    return built


def example(seed: int, authors: list[int], source: str = "d.jsonl:1") -> Example:
    """Random tokens; every position belongs to the next author, those before the first to the base."""
    ids = torch.randint(3, 280, (len(authors),), generator=torch.Generator().manual_seed(seed))
    roles, speaker = [0] * len(authors), max(authors)
    for at in range(len(authors) - 1, -1, -1):
        roles[at] = speaker
        speaker = authors[at] or speaker
    first = next(at for at, author in enumerate(authors) if author)
    roles[: first - 1] = [0] * (first - 1)
    return Example(source, ids, torch.tensor(authors), torch.tensor(roles))


TEAM = (
    example(1, [0] * 4 + [1] * 3 + [0] + [2] * 4 + [0] * 3 + [1] * 2 + [3] * 3),
    example(2, [0] * 3 + [2] * 3 + [0] * 2 + [3] * 2 + [0]),
)


def losses_by_role(logits: torch.Tensor, one: Example) -> torch.Tensor:
    """[n_roles + 1] sums, the plain way."""
    losses = F.cross_entropy(logits.float(), one.targets, reduction="none", ignore_index=-100)
    return torch.zeros(len(ROLES) + 1).index_add(0, one.loss_roles, losses)


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj")], ids=["q,v", "q,k,v"])
def test_a_shared_batch_is_what_the_reference_says(targets: tuple[str, ...]) -> None:
    adapters = make_adapter_set(tiny_model(), ROLES, targets=targets)
    with torch.no_grad():
        got = RoleLoss(build(adapters))(**loss_inputs(pack(TEAM), one_pass=True))
    want = sum(
        losses_by_role(
            reference_logits(tiny_model(), adapters, one.token_ids.tolist(), one.roles.tolist(), "base_lr_shared"), one
        )
        for one in TEAM
    )
    torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-5)
    assert got[0] == 0
    assert (got[1:] > 1).all()


def test_a_per_role_batch_is_pefts_own_loss() -> None:
    adapters = make_adapter_set(tiny_model(), ROLES)
    views = list(RoleViews(TEAM))
    with torch.no_grad():
        got = RoleLoss(build(adapters))(**loss_inputs(pack(views), one_pass=False))
    want = torch.zeros(len(ROLES) + 1)
    for role, spec in enumerate(adapters.roles, start=1):
        config = LoraConfig(r=spec.rank, lora_alpha=spec.alpha, target_modules=list(adapters.targets))
        model = get_peft_model(tiny_model(), config)
        with torch.no_grad():
            for path, module in model.get_base_model().named_modules():
                if path in adapters.shared_a:
                    module.lora_A["default"].weight.copy_(adapters.shared_a[path])
                    module.lora_B["default"].weight.copy_(adapters.role_b[path][role - 1])
            for view in views:
                if view.roles[0] == role:
                    labels = view.token_ids.where(view.authors == role, -100)[None]
                    out = model(input_ids=view.token_ids[None], labels=labels)
                    want[role] += out.loss * (view.targets != -100).sum()
    torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-5)


def test_losses_and_their_gradient_are_those_of_cross_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(role_loss, "FLOATS_AT_ONCE", 120)  # three rows at a time
    logits = (4 * torch.randn(10, 40)).requires_grad_()
    targets, weights = torch.randint(0, 40, (10,)), torch.rand(10)
    losses = role_loss._TokenLosses.apply(logits, targets)
    (grad,) = torch.autograd.grad((losses * weights).sum(), logits)
    plain = F.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(losses, plain)
    torch.testing.assert_close(grad, torch.autograd.grad((plain * weights).sum(), logits)[0])


TINY = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
HEADS = {
    "plain": (LlamaConfig, {}),
    "plain, and tied to the embeddings": (LlamaConfig, {"tie_word_embeddings": True}),
    "capped": (Gemma2Config, {"final_logit_softcapping": 0.5, "head_dim": 16, "num_key_value_heads": 1}),
    "divided": (GraniteConfig, {"logits_scaling": 8.0}),
    "multiplied": (CohereConfig, {"logit_scale": 0.25}),
    "of a decoder within the decoder": (OPTConfig, {"word_embed_proj_dim": 32, "ffn_dim": 48}),
}


@pytest.mark.parametrize("kind", HEADS)
def test_what_comes_after_the_decoder_is_the_models_own(kind: str) -> None:
    config, own = HEADS[kind]
    model = AutoModelForCausalLM.from_config(config(**TINY, **own, pad_token_id=0)).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False).mul_(10)  # so that a cap can be felt
    decoder = model.get_decoder()
    path = next(name for name, module in model.named_modules() if module is decoder)
    ids = torch.randint(3, 300, (1, 9))
    outputs = decoder(input_ids=ids, use_cache=False)
    logits_of = role_loss._after_decoder(model, path, type(outputs))
    want = model(input_ids=ids, use_cache=False).logits[0]
    torch.testing.assert_close(logits_of(outputs.last_hidden_state[0, 4:]), want[4:])
    assert model.get_decoder() is decoder


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_head_in_pieces_gives_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses, gradients and what is likeliest; Gemma's logits, which are capped after the head, come from the model."""
    adapters = make_adapter_set(tiny_model(family=family), ROLES)
    results = []
    for limit in (1 << 26, 3 * 300):
        monkeypatch.setitem(role_loss.LOGITS_AT_ONCE, "cpu", limit)
        built = build(adapters, family=family)
        sums, right = RoleLoss(built)(**loss_inputs(pack(TEAM), one_pass=True), judge=True)
        (sums * torch.arange(4)).sum().backward()
        results.append((sums, right, [p.grad for p in built.adapter_parameters()]))
    (sums, right, grads), (sums_, right_, grads_) = results
    torch.testing.assert_close(sums, sums_)
    assert torch.equal(right, right_)
    for grad, grad_ in zip(grads, grads_, strict=True):
        torch.testing.assert_close(grad, grad_, atol=1e-5, rtol=1e-3)


def test_nothing_as_large_as_all_logits_outlives_a_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither logits nor their gradients."""
    kept: list[StorageWeakRef] = []
    empty_like = torch.empty_like

    def recorded(tensor: torch.Tensor) -> torch.Tensor:
        made = empty_like(tensor)
        kept.append(StorageWeakRef(made.untyped_storage()))
        return made

    monkeypatch.setattr(torch, "empty_like", recorded)
    monkeypatch.setitem(role_loss.LOGITS_AT_ONCE, "cpu", 3 * 300)
    batch = pack(TEAM)
    sums = RoleLoss(build(make_adapter_set(tiny_model(), ROLES)))(**loss_inputs(batch, one_pass=True))
    pieces = -(-int((batch.targets != -100).sum()) // 3)
    assert len(kept) == pieces > 1
    assert all(one.expired() for one in kept)
    sums.sum().backward()
    assert len(kept) == 2 * pieces, "each is worked out again"


def test_what_is_judged_right_is_the_likeliest_token() -> None:
    adapters = make_adapter_set(tiny_model(), ROLES)
    batch = pack(TEAM)
    logits = [
        reference_logits(tiny_model(), adapters, one.token_ids.tolist(), one.roles.tolist(), "base_lr_shared")
        for one in TEAM
    ]
    likeliest = torch.cat([part.argmax(-1) for part in logits])
    targets = batch.targets.clone()
    first = (targets != -100).nonzero()[::2].squeeze(-1)
    targets[first] = likeliest[first]  # every other target becomes what the model would say
    with torch.no_grad():
        _, right = RoleLoss(build(adapters))(**(loss_inputs(batch, one_pass=True) | {"targets": targets}), judge=True)
    assert torch.equal(right, (targets == -100) | (targets == likeliest))
    assert right[first].all()
    assert not right.all()


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj", "up_proj")])
@pytest.mark.parametrize("one_pass", [True, False])
def test_layers_that_are_computed_again_give_the_same_gradients(targets: tuple[str, ...], one_pass: bool) -> None:
    """With dropout, and with another batch between the forward and the backward pass."""
    adapters = make_adapter_set(tiny_model(), ROLES, targets=targets)
    batch = pack(TEAM if one_pass else list(RoleViews(TEAM)))
    other = pack([example(5, [0, 0, 3, 3, 0, 1])])
    grads = []
    for recompute in (False, True):
        built = build(adapters)
        loss = RoleLoss(built, recompute=recompute).train()
        torch.manual_seed(3)
        first = loss(**loss_inputs(batch, one_pass)).sum()
        second = loss(**loss_inputs(other, one_pass=not one_pass)).sum()
        (first + 2 * second).backward()
        grads.append([p.grad for p in built.adapter_parameters()])
    for plain, again in zip(*grads, strict=True):
        torch.testing.assert_close(plain, again, atol=1e-6, rtol=1e-5)


def test_every_b_and_a_learn_in_both_kinds_of_batch() -> None:
    for one_pass in (True, False):
        built = build(make_adapter_set(tiny_model(), ROLES))
        batch = TEAM if one_pass else list(RoleViews(TEAM))
        RoleLoss(built)(**loss_inputs(pack(batch), one_pass)).sum().backward()
        for parameter in built.adapter_parameters():
            assert parameter.grad is not None
            assert parameter.grad.abs().max() > 0
        assert all(p.grad is None for p in built.model.parameters() if not p.requires_grad)


def test_a_role_without_a_token_in_the_batch_has_a_gradient_of_zero() -> None:
    """Several processes add gradients up: all must have one for every parameter."""
    built = build(make_adapter_set(tiny_model(), ROLES))
    RoleLoss(built)(**loss_inputs(pack([example(3, [0, 0, 1, 1])]), one_pass=False)).sum().backward()
    for module in built.modules.values():
        grads: list[Any] = [b.grad for b in module.role_b]
        assert all(grad is not None for grad in grads)
        assert grads[0].abs().max() > 0
        assert grads[1].abs().max() == 0
