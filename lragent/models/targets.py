"""Which modules of a model the roles adapt, and whether adapters fit it."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from lragent.adapter_set import TARGETS, AdapterSet
from lragent.errors import UserError


def target_modules(model: nn.Module, targets: Iterable[str]) -> list[str]:
    """Module paths of all linear layers, plain or quantised, whose last name is in `targets`, in the model's order.

    Experts of a mixture are left out: they see tokens in an order of their own, so that a role per position is lost.
    """
    wanted = set(targets)
    return [
        path
        for path, module in model.named_modules()
        if path.rpartition(".")[2] in wanted and _is_linear(module) and "experts" not in path.split(".")
    ]


def check_adaptable(model: nn.Module, targets: Iterable[str]) -> None:
    """Raise `UserError` naming the architecture unless every target names linear layers of the model.

    The separate q, k and v projections must be there in any case: the decomposed cache is made of what they compute.
    """
    architecture = type(model).__name__
    targets = tuple(targets)
    for target in targets:
        if target not in TARGETS:
            raise UserError(f"target {target!r} cannot be adapted; the targets are {', '.join(TARGETS)}")
    for target in ("q_proj", "k_proj", "v_proj", *targets):
        if not target_modules(model, [target]):
            raise UserError(
                f"{architecture} has no {target} layers to adapt; use a model with separate q_proj, k_proj and v_proj "
                "(Llama, Mistral, Qwen and their like)"
            )


def check_fits(model: nn.Module, adapters: AdapterSet) -> None:
    """Raise `UserError` unless every module that `adapters` adapt is in the model and of their size."""
    modules = dict(model.named_modules())
    for path in adapters.module_paths:
        module = modules.get(path)
        if module is None or not _is_linear(module):
            raise UserError(f"the adapters adapt {path}, and {type(model).__name__} has no such linear layer")
        size = (module.in_features, module.out_features)
        theirs = (adapters.shared_a[path].shape[1], adapters.role_b[path].shape[1])
        if size != theirs:
            raise UserError(
                f"the adapters take {path} to have {theirs[0]} inputs and {theirs[1]} outputs; "
                f"this model's has {size[0]} and {size[1]}"
            )


def _is_linear(module: nn.Module) -> bool:
    """Quantised layers are no `nn.Linear` in every library, but all say their sizes by these names."""
    return isinstance(getattr(module, "in_features", None), int) and isinstance(
        getattr(module, "out_features", None), int
    )
