"""How much of what the hardware can do a training step uses: model FLOPs, and the peaks of known GPUs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "H20": 148e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 150e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 6000 Ada": 364e12,
    "RTX A6000": 155e12,
    "RTX 5090": 210e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
"""Dense bfloat16 products with float32 sums, FLOP/s, by words in the device's name; from the makers' data sheets. More
special names stand before those that they contain."""


def peak_flops(device: torch.device) -> float | None:
    """What `device` can do at best, FLOP/s; None where that is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for words, peak in PEAKS.items() if re.search(rf"\b{words}\b", name)), None)


class ModelFlops:
    """FLOPs of learning from a batch: forward, and backward to the activations. What is computed twice counts once.

    The base is frozen, so its matrices cost 2 FLOPs a parameter and token forward and 2 backward; the head is counted
    for the positions that have targets. Attention, causal: 2 products forward, 4 backward, over half of L * L.
    """

    def __init__(self, base: nn.Module) -> None:
        """base: the transformers model, before it is sharded. Adapters in it are left out: they are small."""
        config: Any = base.config
        head = base.get_output_embeddings()  # type: ignore[operator]
        embedded = {id(p) for m in base.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
        in_head = {id(p) for p in head.parameters()}
        self._head = head.in_features * head.out_features
        self._body = sum(
            module.in_features * module.out_features
            for name, module in base.named_modules()
            if isinstance(module, nn.Linear)
            and ".lora_" not in name
            and not {id(p) for p in module.parameters(recurse=False)} & (in_head | embedded)
        )
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self._attention = config.num_hidden_layers * config.num_attention_heads * dim

    def of(self, spans: Sequence[tuple[int, int]], targets: int) -> float:
        """FLOPs of a batch with these trajectories and so many targets."""
        tokens = spans[-1][1]
        squares = sum((end - start) ** 2 for start, end in spans)
        return 4.0 * self._body * tokens + 4.0 * self._head * targets + 6.0 * self._attention * squares
