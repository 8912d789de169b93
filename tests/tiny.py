"""Tiny random models, a tiny ChatML tokenizer and random adapters, for tests that must run in milliseconds.

`tests/` is on the path of the test run, so a test says `from tiny import tiny_model, make_adapter_set`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from lragent.adapter_set import AdapterSet, RoleSpec

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""Ids 0, 1 and 2, as in SmolLM2."""

# A few merges, so that one text has several tokenisations ("the" is one token, or three, or two).
MERGES = (
    ("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("e", "r"), ("a", "n"), ("an", "d"), ("o", "n"), ("r", "e"),
    ("s", "e"), ("Ġ", "a"), ("in", "g"), ("o", "u"), ("e", "n"), ("a", "t"), ("Ġ", "s"), ("e", "s"), ("o", "r"),
    ("Ġ", "w"), ("s", "t"), ("Ġ", "o"), ("a", "r"), ("e", "d"), ("i", "s"),
)  # fmt: skip

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""SmolLM2's own."""

VOCAB_SIZE = 300
"""Of the tiny models; the tokenizer uses 283 of them."""


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with ChatML tokens and SmolLM2's chat template; any text round-trips."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *alphabet, *("".join(m) for m in MERGES)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(MERGES)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS),
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": 7}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM, {"attn_logit_softcapping": 2.0, "sliding_window": 7}),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM, {"sliding_window": 7}),
}
"""Config, model, and what makes it differ from Llama even when tiny."""


def tiny_config(family: str = "llama", **overrides: Any) -> Any:
    """Two layers, hidden 64, four query and two key-value heads of 16, 300 tokens. family: a key of `FAMILIES`."""
    settings: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 2048,
        "initializer_range": 0.15,  # wide enough that attention and logits are far from uniform
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    config, _, own = FAMILIES[family]
    return config(**(settings | own | overrides))


def tiny_model(seed: int = 0, family: str = "llama", **overrides: Any) -> Any:
    """A random float32 model in eval mode, the same for the same seed; `overrides` go to its config.

    Biases and the norms of heads are random too: as transformers makes them, they would do nothing.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = FAMILIES[family][1](tiny_config(family, **overrides)).float().eval()
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "q_norm.weight", "k_norm.weight")):
                nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.5)
        return model


def save_tiny(folder: Path | str, seed: int = 0, **overrides: Any) -> Path:
    """Save `tiny_model(seed, **overrides)` and `tiny_tokenizer()` to `folder`; gives the folder."""
    tiny_model(seed, **overrides).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return Path(folder)


def make_adapter_set(
    model: torch.nn.Module,
    roles: Sequence[str] = ("plan", "action", "reflect"),
    rank: int = 4,
    targets: Sequence[str] = ("q_proj", "v_proj"),
    seed: int = 0,
    tied: bool = True,
    dtype: torch.dtype = torch.float32,
) -> AdapterSet:
    """Random adapters with nonzero `B` for every linear module of `model` whose last name is in `targets`.

    Tied: one `A` for all roles, alpha `2 * rank`. Untied: every role its own `A`, stacked (rank `len(roles) * rank`).
    """
    if not tied:
        from lragent.stacking import stack

        return stack(
            [make_adapter_set(model, [r], rank, targets, seed + 1 + i, True, dtype) for i, r in enumerate(roles)]
        )
    random = torch.Generator().manual_seed(seed)
    shared_a, role_b = {}, {}
    for path, module in model.named_modules():
        if path.rpartition(".")[2] in targets and isinstance(module, torch.nn.Linear):
            a = torch.randn(rank, module.in_features, generator=random) / module.in_features**0.5
            b = torch.randn(len(roles), module.out_features, rank, generator=random) / (4 * rank**0.5)
            shared_a[path], role_b[path] = a.to(dtype), b.to(dtype)
    return AdapterSet(
        base_model="tiny",
        base_fingerprint=None,
        form="tied",
        targets=tuple(targets),
        roles=tuple(RoleSpec(name=name, alpha=2.0 * rank, rank=rank) for name in roles),
        shared_a=shared_a,
        role_b=role_b,
        objective=None,
        prefix_writer=None,
    )
