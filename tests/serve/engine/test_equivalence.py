"""The engine's logits against the slow reference, in every sharing mode."""

from __future__ import annotations

import pytest
import torch
from engines import ROLES, WAYS, Recorder, drive, each_way, tiny_engine
from reference import reference_logits
from tiny import FAMILIES, make_adapter_set, tiny_model

from lragent.modes import SharingMode

TARGETS = {
    "q_v": ("q_proj", "v_proj"),
    "q_k_v": ("q_proj", "k_proj", "v_proj"),
    "q_only": ("q_proj",),
    "all_linear": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("mode", list(SharingMode))
def test_logits_equal_the_reference(mode: SharingMode, targets: tuple[str, ...]) -> None:
    model = tiny_model()
    adapters = make_adapter_set(model, ROLES, targets=targets)
    reused = 0
    for _, answer, role, ids, writers, got in drive(mode, adapters):
        # a role that passes over a context for itself (base_shared, non_shared) reads as one role throughout
        if mode is SharingMode.NON_SHARED:
            writers = [role] * len(ids)
        expected = reference_logits(model, adapters, ids, writers, mode)
        torch.testing.assert_close(got, expected[-len(got) :], **TOLERANCE)
        reused += answer.usage.base_reused
    assert reused > 50


def test_base_shared_runs_an_lr_prefill_and_nothing_more() -> None:
    adapters = make_adapter_set(tiny_model(), ROLES)
    usages = [answer.usage for _, answer, *_ in drive(SharingMode.BASE_SHARED, adapters)]
    first_of_action = usages[1]
    assert first_of_action.lr_reused == 0
    assert first_of_action.base_reused == first_of_action.lr_prefilled > 0
    assert usages[2].lr_reused == usages[2].base_reused > 0
    assert usages[2].lr_prefilled == 0


@pytest.mark.parametrize("budget", [1, 3, 8, 512])
@pytest.mark.parametrize("mode", list(SharingMode))
def test_chunk_size_does_not_matter(mode: SharingMode, budget: int) -> None:
    adapters = make_adapter_set(tiny_model(), ROLES)
    whole = [got for *_, got in drive(mode, adapters)]
    for expected, (*_, got) in zip(whole, drive(mode, adapters, token_budget=budget), strict=True):
        torch.testing.assert_close(got, expected, **TOLERANCE)


def test_one_role_makes_all_modes_agree() -> None:
    model = tiny_model()
    adapters = make_adapter_set(model, ("solo",))
    answers = []
    for mode in SharingMode:
        recorder = Recorder(tiny_engine(mode, adapters))
        ids = list(range(10, 40))
        for _ in range(3):
            ids += (*recorder.ask("solo", ids, 6).token_ids, 5, 6, 7)
        answers.append((ids, recorder.last_logits()))
    for ids, logits in answers[1:]:
        assert ids == answers[0][0]
        torch.testing.assert_close(logits, answers[0][1], **TOLERANCE)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@each_way
@pytest.mark.parametrize("mode", list(SharingMode))
def test_models_of_every_family_equal_the_reference(mode: SharingMode, way: str, family: str) -> None:
    """Windows, biases, and keys that are normalised before or, where they are decomposed, when read."""
    model = tiny_model(family=family)
    adapters = make_adapter_set(model, ROLES, targets=TARGETS["q_k_v"])
    options = {"steps": 4, "model_options": {"family": family}, **WAYS[way]}
    for _, _, role, ids, writers, got in drive(mode, adapters, **options):
        if mode is SharingMode.NON_SHARED:
            writers = [role] * len(ids)
        expected = reference_logits(model, adapters, ids, writers, mode)
        torch.testing.assert_close(got.cpu(), expected[-len(got) :], **TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
@each_way
@pytest.mark.parametrize("mode", list(SharingMode))
def test_one_role_alone_equals_transformers_with_its_weights_merged(mode: SharingMode, way: str, family: str) -> None:
    """Windows that differ by layer and a soft cap on scores included (Gemma)."""
    model = tiny_model(family=family, attn_implementation="eager")
    adapters = make_adapter_set(model, ("solo",))
    recorder = Recorder(tiny_engine(mode, adapters, model_options={"family": family}, token_budget=8, **WAYS[way]))
    ids = list(range(10, 40))
    with torch.no_grad():
        for path in adapters.module_paths:
            delta = adapters.scaled_b(path)[0] @ adapters.shared_a[path]
            model.get_submodule(path).weight.add_(delta)
        for _ in range(2):
            answer = recorder.ask("solo", ids, 6)
            ids += answer.token_ids
            expected = model(input_ids=torch.tensor([ids[:-1]])).logits[0, -6:]
            torch.testing.assert_close(recorder.last_logits().cpu(), expected, **TOLERANCE)
