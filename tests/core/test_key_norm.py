"""Which models' keys can be normalised for each reader."""

from __future__ import annotations

import pytest
from engines import tiny_engine
from tiny import FAMILIES, make_adapter_set, tiny_model
from torch import nn

from lragent.errors import UserError
from lragent.key_norm import key_norm, norm_eps, unsupported_key_norm

LAYER = "model.layers.1.self_attn"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_norm_over_one_head_or_none(family: str) -> None:
    model = tiny_model(family=family)
    norm = key_norm(model.get_submodule(LAYER))
    assert (norm is not None) == (family in ("qwen3", "gemma3"))
    assert (unsupported_key_norm(model) is not None) == (family == "gemma3")
    if family == "qwen3":
        assert norm is not None
        assert norm_eps(norm) == model.config.rms_norm_eps


@pytest.mark.parametrize(
    ("name", "norm", "refused"),
    [
        ("k_norm", nn.RMSNorm(16, eps=1e-5), False),
        ("k_norm", nn.Identity(), False),
        ("q_norm", nn.LayerNorm(16), False),
        ("k_norm", nn.LayerNorm(16), True),
        ("k_norm", nn.RMSNorm(32, eps=1e-5), True),  # over all heads at once
        ("k_norm", nn.RMSNorm(16, eps=1e-5, elementwise_affine=False), True),
        ("key_layernorm", nn.RMSNorm(16, eps=1e-5), True),  # after rotation
        ("qk_norm", nn.RMSNorm(16, eps=1e-5), True),
    ],
)
def test_other_norms_are_named(name: str, norm: nn.Module, refused: bool) -> None:
    model = tiny_model()
    model.get_submodule(LAYER).add_module(name, norm)
    assert unsupported_key_norm(model) == (f"{LAYER}.{name} ({type(norm).__name__})" if refused else None)


@pytest.mark.parametrize("mode", ["base_shared", "base_lr_shared"])
def test_the_engine_refuses_what_it_cannot_decompose_and_serves_the_rest(mode: str) -> None:
    options = {"model_options": {"family": "gemma3"}}
    with_keys = make_adapter_set(tiny_model(family="gemma3"), targets=("k_proj", "v_proj"))
    with pytest.raises(UserError, match=rf"--sharing {mode}: model\.layers\.0\.self_attn\.k_norm \(Gemma3RMSNorm\)"):
        tiny_engine(mode, with_keys, **options)
    tiny_engine("non_shared", with_keys, **options)
    tiny_engine(mode, make_adapter_set(tiny_model(family="gemma3")), **options)
