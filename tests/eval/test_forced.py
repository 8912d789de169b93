"""Whole sequences at once against the definition, which goes token by token."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from reference import reference_logits
from tiny import make_adapter_set, tiny_model
from tolerances import MODEL_TOLERANCES

from lragent.adapter_set import AdapterSet
from lragent.errors import UserError
from lragent.eval.analysis.forced import Forced, LayerCaches, score, turns_of
from lragent.modes import SharingMode
from lragent.train.data import Example

ROLES = ("plan", "action", "reflect")
TARGETS = {
    "q_v": ("q_proj", "v_proj"),
    "q_k_v": ("q_proj", "k_proj", "v_proj"),
    "q_only": ("q_proj",),
    "all_linear": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}
EXACT = MODEL_TOLERANCES[torch.float32]


def example(seed: int, authors: list[int]) -> Example:
    """Random tokens; every position belongs to the next author, those before the first turn's opening to the base."""
    ids = torch.randint(3, 280, (len(authors),), generator=torch.Generator().manual_seed(seed))
    roles, speaker = [0] * len(authors), max(authors)
    for at in range(len(authors) - 1, -1, -1):
        roles[at] = speaker
        speaker = authors[at] or speaker
    first = next(at for at, author in enumerate(authors) if author)
    roles[: first - 1] = [0] * (first - 1)
    return Example("d.jsonl:1", ids, torch.tensor(authors), torch.tensor(roles))


TEAM = (
    example(1, [0] * 4 + [1] * 3 + [0] + [2] * 4 + [0] * 3 + [1] * 2 + [3] * 3),
    example(2, [0] * 3 + [2] * 3 + [0] * 2 + [3] * 2 + [0]),
    example(3, [0] * 2 + [3] * 2 + [0] * 2 + [1] * 4 + [0] + [1] * 2 + [0] * 5),
)


def forced(adapters: AdapterSet, **options: Any) -> Forced:
    return Forced(tiny_model(), adapters, **options)


def expected(model: Any, adapters: AdapterSet, one: Example, mode: str) -> torch.Tensor:
    logits = reference_logits(model, adapters, one.token_ids.tolist(), one.roles.tolist(), mode)  # type: ignore[arg-type]
    return torch.log_softmax(logits[one.targets != -100], dim=-1)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("mode", list(SharingMode))
def test_every_mode_is_what_the_reference_says(mode: SharingMode, targets: tuple[str, ...], device: str) -> None:
    adapters = make_adapter_set(tiny_model(), ROLES, targets=targets)
    got = list(Forced(tiny_model().to(device), adapters).logprobs(TEAM, mode))
    assert len(got) == len(TEAM)
    for one, logprobs in zip(TEAM, got, strict=True):
        assert logprobs.device.type == device
        torch.testing.assert_close(logprobs.cpu(), expected(tiny_model(), adapters, one, mode), **EXACT)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("mode", list(SharingMode))
def test_windows_biases_and_norms_of_keys(mode: SharingMode, family: str) -> None:
    model = tiny_model(family=family)
    adapters = make_adapter_set(model, ROLES, targets=TARGETS["q_k_v"])
    got = next(Forced(tiny_model(family=family), adapters).logprobs(TEAM[:1], mode))
    torch.testing.assert_close(got, expected(model, adapters, TEAM[0], mode), **EXACT)


@pytest.mark.parametrize("mode", list(SharingMode))
def test_stacked_adapters(mode: SharingMode) -> None:
    adapters = make_adapter_set(tiny_model(), ROLES, tied=False)
    got = next(forced(adapters).logprobs(TEAM[:1], mode))
    torch.testing.assert_close(got, expected(tiny_model(), adapters, TEAM[0], mode), **EXACT)


def test_the_modes_differ() -> None:
    """Else the tests above could not tell one from another."""
    runs = forced(make_adapter_set(tiny_model(), ROLES))
    first = [next(runs.logprobs(TEAM[:1], mode)) for mode in SharingMode]
    for at, one in enumerate(first):
        for other in first[at + 1 :]:
            assert (one - other).abs().max() > 0.01


@pytest.mark.parametrize("tokens", [1, 30, 60])
@pytest.mark.parametrize("mode", list(SharingMode))
def test_what_is_packed_together_does_not_matter(mode: SharingMode, tokens: int) -> None:
    adapters = make_adapter_set(tiny_model(), ROLES)
    whole = list(forced(adapters).logprobs(TEAM, mode))
    for got, want in zip(forced(adapters, tokens_per_pass=tokens).logprobs(TEAM, mode), whole, strict=True):
        torch.testing.assert_close(got, want, **EXACT)


def test_scores_are_counted_by_role() -> None:
    adapters = make_adapter_set(tiny_model(), ROLES)
    mode = SharingMode.BASE_LR_SHARED
    # Of the first trajectory's second turn every token becomes what the role would say.
    one, at = TEAM[0], slice(8, 12)
    ids = one.token_ids.clone()
    for position in range(at.start, at.stop):
        logits = reference_logits(tiny_model(), adapters, ids.tolist(), one.roles.tolist(), "base_lr_shared")
        ids[position] = logits[position - 1].argmax()
    team = [dataclasses.replace(one, token_ids=ids), *TEAM[1:]]
    got = score(forced(adapters), team, mode)
    assert {name: part["turns"] for name, part in got.items()} == {"plan": 4, "action": 2, "reflect": 3, "all": 9}
    assert {name: part["tokens"] for name, part in got.items()} == {"plan": 11, "action": 7, "reflect": 7, "all": 25}
    assert got["action"]["right"] >= 1
    assert got["all"]["right"] == sum(got[name]["right"] for name in ROLES) < 9
    losses = []
    for some in team:
        targets = some.targets[some.targets != -100]
        losses += (-expected(tiny_model(), adapters, some, mode).gather(-1, targets[:, None])).flatten().tolist()
    assert got["all"]["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    whole = sum(got[name]["loss"] * got[name]["tokens"] for name in ROLES)
    assert whole == pytest.approx(got["all"]["loss"] * got["all"]["tokens"])


def test_turns_are_counted() -> None:
    assert turns_of(TEAM[0]).tolist() == [0] * 3 + [1] * 4 + [2] * 2 + [3] * 3


def test_caches_are_what_each_role_alone_would_leave() -> None:
    """Of the first layer, whose input no role has touched, and of all layers for shapes and order."""
    adapters = make_adapter_set(tiny_model(), ROLES, targets=TARGETS["q_k_v"])
    model, seen = tiny_model(), {}

    def see(layer: int, caches: LayerCaches) -> None:
        seen[layer] = caches

    one = TEAM[2]
    forced(adapters).caches(one, see)
    assert sorted(seen) == [0, 1]
    length = 12  # what follows the last target is not run
    for caches in seen.values():
        assert caches.low_v is not None
        assert caches.low_k is not None
        assert caches.key.shape == caches.value.shape == (5, length, 32)
        assert caches.low_v.shape == caches.low_k.shape == (5, length, 4)
    path = "model.layers.0.self_attn.v_proj"
    hidden = model.model.layers[0].input_layernorm(model.model.embed_tokens(one.token_ids[:length]))
    for stream in range(5):
        torch.testing.assert_close(seen[0].value[stream], hidden @ model.get_submodule(path).weight.T)
        torch.testing.assert_close(seen[0].low_v[stream], hidden @ adapters.shared_a[path].T)
    ups = seen[0].up_v
    assert ups is not None
    torch.testing.assert_close(ups, adapters.scaled_b(path).transpose(1, 2))
    # The shared pass begins with the base's tokens, so its cache does too; then another role goes on.
    values = seen[1].value
    prefix = int((one.roles == 0).sum())
    torch.testing.assert_close(values[4, :prefix], values[0, :prefix])
    assert (values[4, prefix:] - values[0, prefix:]).abs().max() > 1e-3
    assert (values[1] - values[2]).abs().max() > 1e-3


def test_a_norm_of_keys_that_no_reader_can_apply_is_named() -> None:
    adapters = make_adapter_set(tiny_model(family="gemma3"), ROLES, targets=TARGETS["q_k_v"])
    runs = Forced(tiny_model(family="gemma3"), adapters)
    assert next(runs.logprobs(TEAM[:1], "full_shared")).isfinite().all()
    with pytest.raises(UserError, match="k_norm"):
        next(runs.logprobs(TEAM[:1], "base_shared"))


def test_adapters_of_another_model_are_refused() -> None:
    with pytest.raises(UserError, match="layers"):
        Forced(tiny_model(num_hidden_layers=1), make_adapter_set(tiny_model(), ROLES))
