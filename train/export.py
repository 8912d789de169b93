"""What a training run leaves behind: the pack, one PEFT folder per role, and a model card."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lragent.adapter_set import AdapterSet
from lragent.config import dump_config
from lragent.models import ModelSource
from lragent.pack import write_pack
from lragent.peft_io import write_peft_folders
from lragent.tied_lora import RoleModel
from lragent.train.distributed import matrices
from lragent.train.settings import TrainSettings

PACK, PEFT, CARD, CURVES = "pack.safetensors", "peft", "README.md", "losses.png"


@dataclass(frozen=True)
class RunResult:
    """What a run did; the numbers of its last line of output and of the model card."""

    steps: int
    """Optimizer steps."""
    tokens: int
    """Positions processed, over all processes."""
    targets: int
    """Positions learnt from."""
    seconds: float
    """Of training, evaluations included, loading and saving not."""
    train_loss_first: float
    """Mean loss per target over the first tenth of the steps (at least 1, at most 10)."""
    train_loss_last: float
    """The same over the last."""
    eval_before: Mapping[str, Mapping[str, float]] | None
    eval_after: Mapping[str, Mapping[str, float]] | None
    accuracy_before: Mapping[str, Mapping[str, float]] | None = None
    """Shares of turns predicted exactly, as in `EvalScores`."""
    accuracy_after: Mapping[str, Mapping[str, float]] | None = None
    authored: Mapping[str, int] | None = None
    """Tokens of the data that each role learns, in one pass over it."""
    engine: str = "one process"
    """What shared the work out."""
    processes: int = 1
    memory_gib: Sequence[float] = ()
    """Of each process: the most that was allocated on its GPU, or what it holds of the machine's memory at the end."""


def adapter_set(
    built: RoleModel, settings: TrainSettings, source: ModelSource, weights: Mapping[str, torch.Tensor]
) -> AdapterSet:
    """The trained matrices, unscaled. weights: whole, on the CPU, in float32, by the names of `named_adapters`."""
    shared_a, role_b = matrices(built, weights)
    return AdapterSet(
        base_model=source.name,
        base_fingerprint=source.fingerprint(),
        form="tied",
        targets=built.targets,
        roles=built.specs,
        shared_a=shared_a,
        role_b=role_b,
        objective=settings.objective,
        prefix_writer=settings.prefix_writer.value,
    )


def export(adapters: AdapterSet, settings: TrainSettings, result: RunResult, folder: Path) -> None:
    """Write the pack, the PEFT folders and the model card into `folder`, which exists.

    Where the curves of the losses lie there already, the card shows them.
    """
    write_pack(folder / PACK, adapters)
    write_peft_folders(adapters, folder / PEFT)
    card = model_card(adapters, settings, result, curves=(folder / CURVES).is_file())
    (folder / CARD).write_text(card, encoding="utf-8")


def model_card(adapters: AdapterSet, settings: TrainSettings, result: RunResult, curves: bool = False) -> str:
    """Markdown with the front matter that model hubs read. curves: whether `CURVES` lies beside it."""
    names = ", ".join(adapters.role_names)
    lines = [
        "---",
        f"base_model: {json.dumps(adapters.base_model)}",
        "library_name: peft",
        "tags: [lora, multi-lora, lragent]",
        "---",
        f"# Roles {names} for {adapters.base_model}",
        "",
        f"{len(adapters.roles)} LoRA roles that share one down-projection A, trained with LRAgent. "
        f"`{PACK}` holds them all; `{PEFT}/<role>` holds each as a plain PEFT adapter.",
        "",
        *_how_to_serve(adapters),
        "## Data",
        "",
        f"- trained on `{settings.data.name}`: {result.targets} authored tokens learnt in {result.tokens} processed",
        *_shares(result),
        f"- evaluated on `{settings.eval_data.name}`" if settings.eval_data else "- not evaluated on held-out data",
        "",
        "## Losses",
        "",
        "Mean cross-entropy per authored token, in nats.",
        "",
        "| | before | after |",
        "|---|---|---|",
        f"| training (first and last steps) | {result.train_loss_first:.4f} | {result.train_loss_last:.4f} |",
        *_rows("held out", result.eval_before, result.eval_after, "{:.4f}"),
        *_rows("held out, turns predicted exactly", result.accuracy_before, result.accuracy_after, "{:.1%}"),
        "",
        *([f"![losses]({CURVES})", ""] if curves else []),
        "## Hyperparameters",
        "",
        *[f"- {name}: {json.dumps(value)}" for name, value in dump_config(settings).items() if name not in _PRIVATE],
        f"- steps: {result.steps}",
        f"- tokens a step: {result.tokens / result.steps:.0f}",
        f"- processes: {result.processes} ({result.engine})",
        f"- seconds: {result.seconds:.1f}",
        "",
        "## Versions",
        "",
        *[f"- {package}: {found}" for package, found in _versions(settings, result)],
        f"- python: {platform.python_version()}",
        f"- base fingerprint: {adapters.base_fingerprint}",
        *(
            ["- the base was kept in 4 bits (nf4) while training; the fingerprint is its checkpoint's"]
            if settings.quantize
            else []
        ),
        "",
    ]
    return "\n".join(lines)


def _versions(settings: TrainSettings, result: RunResult) -> list[tuple[str, str]]:
    packages = ["lragent", "torch", "transformers", "peft", "accelerate"]
    packages += ["deepspeed"] if "DeepSpeed" in result.engine else []
    packages += ["bitsandbytes"] if settings.quantize else []
    return [(package, version(package)) for package in packages]


def _shares(result: RunResult) -> list[str]:
    if not result.authored:
        return []
    whole = sum(result.authored.values())
    shares = ", ".join(f"{role} {tokens} ({tokens / whole:.0%})" for role, tokens in result.authored.items())
    return [f"- authored tokens by role: {shares}"]


_PRIVATE = ("data", "eval_data", "out", "model", "tracking", "project")
"""Settings that say where things lie on one machine, and nothing about the training."""


def _how_to_serve(adapters: AdapterSet) -> list[str]:
    modes: dict[Any, str] = {
        "shared": "base_lr_shared",
        "per_role": "non_shared",
        "mixed": "base_lr_shared or non_shared",
    }
    return [
        "```",
        f"lragent serve --roles {PACK}",
        "```",
        "",
        "With PEFT alone, one role at a time:",
        "",
        "```python",
        f'model = PeftModel.from_pretrained(base, "{PEFT}/{adapters.role_names[0]}")',
        "```",
        "",
        f"Trained with the objective `{adapters.objective}`: serve in the sharing mode {modes[adapters.objective]}, "
        f"with `prefix_writer: {adapters.prefix_writer}`.",
        "",
    ]


def _rows(
    what: str,
    before: Mapping[str, Mapping[str, float]] | None,
    after: Mapping[str, Mapping[str, float]] | None,
    form: str,
) -> list[str]:
    if before is None or after is None:
        return []
    return [
        f"| {what}, {kind}, {role} | {form.format(value)} | {form.format(after[kind][role])} |"
        for kind, by_role in before.items()
        for role, value in by_role.items()
    ]
