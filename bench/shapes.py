"""Models of known shapes with random weights: right for speed, of no use for anything else. Nothing is downloaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lragent.errors import UserError
from lragent.models.quiet import quiet_libraries

LEAST_POSITIONS = 131_072
"""Positions that every model gets; more where the measurement needs them."""


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes. family: whose model class of transformers it is."""

    family: str
    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool = False
    """Whether the head is the embedding table."""
    theta: float = 10_000.0
    """Of the rotary embedding."""


SHAPES = {
    "tiny": Shape("llama", 2, 64, 96, 4, 2, 16, 300, tied=True),
    "smollm2-135m": Shape("llama", 30, 576, 1536, 9, 3, 64, 49_152, tied=True, theta=100_000.0),
    "llama-3.2-1b": Shape("llama", 16, 2048, 8192, 32, 8, 64, 128_256, tied=True, theta=500_000.0),
    "llama-3.1-8b": Shape("llama", 32, 4096, 14_336, 32, 8, 128, 128_256, theta=500_000.0),
    "mistral-7b": Shape("mistral", 32, 4096, 14_336, 32, 8, 128, 32_768, theta=1_000_000.0),
    "qwen2.5-7b": Shape("qwen2", 28, 3584, 18_944, 28, 4, 128, 152_064, theta=1_000_000.0),
    "qwen3-8b": Shape("qwen3", 36, 4096, 12_288, 32, 8, 128, 151_936, theta=1_000_000.0),
}
"""By name."""


def shape_named(name: str) -> Shape:
    """Raises UserError naming the shapes there are."""
    if name not in SHAPES:
        raise UserError(f"--shape: there is no shape {name!r}; there are {', '.join(SHAPES)}.")
    return SHAPES[name]


def shape_config(shape: Shape, positions: int = LEAST_POSITIONS) -> Any:
    """The transformers config, for contexts of at least `positions` tokens."""
    from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

    families: dict[str, tuple[type, dict[str, Any]]] = {
        "llama": (LlamaConfig, {}),
        "mistral": (MistralConfig, {"sliding_window": None}),
        "qwen2": (Qwen2Config, {}),
        "qwen3": (Qwen3Config, {}),
    }
    config, own = families[shape.family]
    return config(
        num_hidden_layers=shape.layers,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.tied,
        rope_parameters={"rope_type": "default", "rope_theta": shape.theta},
        max_position_embeddings=max(positions, LEAST_POSITIONS),
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **own,
    )


def random_model(
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    *,
    positions: int = LEAST_POSITIONS,
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """In eval mode. It is made where it will run and in its own dtype, so that 8 billion weights take a GPU seconds."""
    from transformers import AutoModelForCausalLM

    with quiet_libraries(), torch.device(device):
        model = AutoModelForCausalLM.from_config(
            shape_config(shape, positions), dtype=dtype, attn_implementation=attn_implementation
        )
    return model.eval()


def stand_in_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A word for each id: what the engine decodes where a model has no texts."""
    words = {f"w{token}": token for token in range(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(vocab=words, unk_token="w0"))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)
