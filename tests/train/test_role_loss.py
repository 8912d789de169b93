"""The losses of flat batches against PEFT, the slow reference and plain cross-entropy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from reference import reference_logits
from tiny import make_adapter_set, tiny_model

from lragent.adapter_set import AdapterSet
from lragent.attention import ATTENTION, register_attention
from lragent.tied_lora import RoleModel, build_role_model
from lragent.train import role_loss
from lragent.train.batches import pack
from lragent.train.data import Example, role_views
from lragent.train.role_loss import RoleLoss, loss_inputs

ROLES = ("plan", "action", "reflect")


def build(adapters: AdapterSet, dtype: torch.dtype = torch.float32) -> RoleModel:
    register_attention()
    model = tiny_model().to(dtype)
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
    views = [view for one in TEAM for view in role_views(one)]
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


def test_every_b_and_a_learn_in_both_kinds_of_batch() -> None:
    for one_pass in (True, False):
        built = build(make_adapter_set(tiny_model(), ROLES))
        batch = TEAM if one_pass else [view for one in TEAM for view in role_views(one)]
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
