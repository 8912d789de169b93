"""Models that normalise their keys after projection, such as Qwen3, where an adapter on `k_proj` is applied when read.

A norm is not linear: that of `K + LR B` cannot be had from that of `K`. So the keys are cached as `k_proj`'s base layer
gives them, and normalised, then rotated, for each reader.
"""

from __future__ import annotations

from torch import nn

KEY_NORM = "k_norm"
"""What transformers calls the norm of an attention layer's keys that comes before their rotation."""


def key_norm(layer: nn.Module) -> nn.Module | None:
    """The norm of an attention layer's keys, or None."""
    norm = getattr(layer, KEY_NORM, None)
    return None if isinstance(norm, nn.Identity) else norm


def norm_eps(norm: nn.Module) -> float | None:
    """What a plain RMSNorm, `weight * x / sqrt(mean(x^2) + eps)`, adds; None where `norm` is of another kind.

    Gemma's multiplies by `1 + weight` and calls its eps otherwise than Llama's and its likes.
    """
    name = "eps" if isinstance(norm, nn.RMSNorm) else "variance_epsilon"
    return getattr(norm, name, None) if type(norm).__name__.endswith("RMSNorm") else None


def unsupported_key_norm(model: nn.Module) -> str | None:
    """The path and kind of a norm of keys that cannot be applied for each reader, or None where there is none.

    What can be is a plain RMSNorm over the dimensions of one head, before rotation.
    """
    for path, layer in model.named_modules():
        if not hasattr(layer, "k_proj"):
            continue
        for name, norm in layer.named_children():
            if "norm" not in name or not name.startswith(("k_", "key_", "qk_")) or isinstance(norm, nn.Identity):
                continue
            weight = getattr(norm, "weight", None)
            of_one_head = weight is not None and tuple(weight.shape) == (getattr(layer, "head_dim", None),)
            if name != KEY_NORM or norm_eps(norm) is None or not of_one_head:
                return f"{path}.{name} ({type(norm).__name__})"
    return None
