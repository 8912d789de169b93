"""The base's elementwise parts through `torch.compile`: norms, and gates of MLPs, forward and backward.

Each of their operations reads and writes all activations; compiled, a norm or a gate is one kernel. The products stay
the library's own. What holds adapters is left alone, as which of them applies changes from batch to batch.
"""

from __future__ import annotations

import torch
from torch import nn

from lragent.tied_lora import RoleModel, TiedLoraLinear


def compile_elementwise(built: RoleModel) -> None:
    """Compile norms and MLPs of the decoder's layers, in place, for any number of tokens.

    They are compiled when they first run. From then on in this process, what cannot be compiled runs as it is, and
    torch warns of it: a run must not end for want of a compiler.
    """
    torch._dynamo.config.suppress_errors = True
    for module in built.model.get_base_model().get_decoder().modules():
        if _is_elementwise(module):
            module.compile(dynamic=True)


def _is_elementwise(module: nn.Module) -> bool:
    name = type(module).__name__
    if name.endswith("RMSNorm") or isinstance(module, nn.LayerNorm):
        return True
    parts = list(module.children())
    linear = sum(isinstance(part, nn.Linear) for part in parts)
    return (
        name.endswith("MLP") and linear in (2, 3) and not any(isinstance(m, TiedLoraLinear) for m in module.modules())
    )


def wants_compiling(asked: bool | None, device: torch.device, *, zero3: bool) -> bool:
    """What `compile` in the settings means: None is yes on a GPU, unless ZeRO-3 gathers the base, which DeepSpeed does
    in ways of its own. FSDP2 gathers before a layer begins, and its parts see whole weights."""
    return (device.type == "cuda" and not zero3) if asked is None else asked
