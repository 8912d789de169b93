"""Healing: roles that were trained apart, trained a little more as one shared cache will serve them.

Adapters with A's of their own can be stacked and served from one cache at once, but none of them has learnt to read
what another has written. A short training of the whole, one pass over each trajectory for all roles, closes the gap.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed

from lragent.adapter_set import AdapterSet
from lragent.atomic import new_folder, refuse_existing
from lragent.attention import ATTENTION, register_attention
from lragent.chat import Renderer
from lragent.errors import UserError
from lragent.eval.intervals import wilson
from lragent.eval.next_step import Messages, NextSteps, next_steps
from lragent.models import load_model, load_tokenizer, resolve_model
from lragent.modes import PrefixWriter
from lragent.pack import read_pack, write_pack
from lragent.peft_io import write_peft_folders
from lragent.serve import Engine
from lragent.stacking import as_tied
from lragent.tied_lora import role_model_from
from lragent.train.data import Example
from lragent.train.distributed import matrices
from lragent.train.evaluation import EvalScores
from lragent.train.examples import load_examples
from lragent.train.loop import DTYPES, fit
from lragent.train.rows import read_rows
from lragent.train.settings import TrainSettings

PACK, PEFT, REPORT = "pack.safetensors", "peft", "report.json"
SERVED = {"per_role": "non_shared", "shared": "base_lr_shared"}
"""How held-out trajectories are run to the sharing mode that they stand for."""
EVALUATIONS = 10
"""While training goes on; more would cost more than they save."""


@dataclass(frozen=True)
class HealSettings:
    """What to heal, with what, and when it is enough."""

    pack: Path
    data: Path
    """Trajectories: JSONL or Parquet, as for training."""
    out: Path
    """New folder for the healed pack, PEFT folders and the report."""
    model: str | None = None
    eval_data: Path | None = None
    """Trajectories to measure on; None = every tenth of `data`, which is then not learnt from."""
    tolerance: float = 1.0
    """Points: healed is what predicts as many turns in `base_lr_shared` as it did before in `non_shared`, but these."""
    epochs: int = 1
    """At most so often over the data."""
    max_tokens: int | None = None
    """Learn from so many at most; None = what `epochs` says."""
    lr: float = 1e-3
    tokens_per_batch: int = 4096
    max_length: int | None = None
    generated: int = 50
    """Held-out trajectories whose turns the engine generates in the end; 0 = none."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises UserError naming the field that is out of range."""
        for name, least in (("epochs", 1), ("max_tokens", 1), ("tokens_per_batch", 1), ("generated", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name}: must be at least {least}, not {value}.")
        for name in ("lr", "tolerance"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"{name}: must be above 0, not {getattr(self, name)}.")


@dataclass(frozen=True)
class Healed:
    """What healing did. Scores are of held-out trajectories, each turn predicted after the gold ones before it."""

    adapters: AdapterSet
    before: EvalScores
    after: EvalScores
    tokens: int
    """Learnt from."""
    steps: int
    seconds: float
    closed: bool
    """Whether the gap is closed."""


def heal_adapters(
    adapters: AdapterSet,
    model: torch.nn.Module,
    examples: Sequence[Example],
    held_out: Sequence[Example],
    *,
    tolerance: float,
    epochs: int,
    lr: float,
    tokens_per_batch: int,
    seed: int,
    max_tokens: int | None = None,
) -> Healed:
    """Train `adapters` on `examples` until the gap is closed. model: the base, which gets the adapters injected."""
    set_seed(seed)
    built = role_model_from(model, adapters)
    tokens = epochs * sum(map(len, examples))
    steps = max(1, min(tokens, max_tokens or tokens) // tokens_per_batch)
    settings = TrainSettings(
        data=Path(), out=Path(), roles=adapters.role_names, objective="shared", max_steps=steps, lr=lr, seed=seed,
        tokens_per_batch=tokens_per_batch, eval_every=max(1, steps // EVALUATIONS), compile=False,
        prefix_writer=PrefixWriter(adapters.prefix_writer or TrainSettings.prefix_writer),
    )  # fmt: skip
    goal: list[float] = []

    def enough(scores: EvalScores) -> bool:
        if not goal:  # the first scores are those before anything is learnt
            goal.append(scores.accuracy("per_role") - tolerance / 100)
        return scores.accuracy("shared") >= goal[0]

    done = fit(settings, built, examples, held_out, eval_objective="mixed", until=enough)
    before, after = _had(done.before), _had(done.after)
    shared_a, role_b = matrices(built, done.weights)
    healed = dataclasses.replace(
        as_tied(adapters),
        shared_a=shared_a,
        role_b=role_b,
        objective="shared" if done.result.tokens else adapters.objective,
        prefix_writer=settings.prefix_writer.value if done.result.tokens else adapters.prefix_writer,
    )
    result = done.result
    return Healed(healed, before, after, result.tokens, result.steps, result.seconds, enough(after))


def _had(scores: EvalScores | None) -> EvalScores:
    if scores is None:
        raise UserError("there are no held-out trajectories; give --eval-data, or at least ten rows of data.")
    return scores


def heal(settings: HealSettings, tell: Callable[[str], None]) -> dict[str, Any]:
    """Heal a pack and write `settings.out`, whole or not at all; returns the report.

    Raises UserError where pack, data and model do not fit together or cannot be used.
    """
    refuse_existing(settings.out)
    source = resolve_model(settings.model)
    adapters = read_pack(settings.pack, expect_fingerprint=source.fingerprint())
    renderer = Renderer(load_tokenizer(source))
    learnt, held_out, gold = _data(settings, adapters, renderer)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    register_attention()
    tell(f"{settings.pack}: {len(adapters.roles)} roles, {adapters.form}; {len(learnt)} trajectories to learn from")
    healed = heal_adapters(
        adapters,
        load_model(source, DTYPES["bf16"], device, ATTENTION),
        learnt,
        held_out,
        tolerance=settings.tolerance,
        epochs=settings.epochs,
        lr=settings.lr,
        tokens_per_batch=settings.tokens_per_batch,
        seed=settings.seed,
        max_tokens=settings.max_tokens,
    )
    if device.type == "cuda":
        torch.cuda.empty_cache()
    with new_folder(settings.out) as out:
        write_pack(out / PACK, healed.adapters)
        write_peft_folders(healed.adapters, out / PEFT)
        report = _report(settings, adapters, healed)
        if settings.generated and gold:
            tell("what the engine generates, before and after …")
            report["generated"] = _generated(settings, out / PACK, gold[: settings.generated])
        (out / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def _data(
    settings: HealSettings, adapters: AdapterSet, renderer: Renderer
) -> tuple[list[Example], list[Example], list[Messages]]:
    """What is learnt from, what is measured on, and the same as messages."""

    def load(path: Path) -> list[Example]:
        found = load_examples(
            path, renderer, adapters.role_names, objective="shared",
            prefix_writer=adapters.prefix_writer or TrainSettings.prefix_writer, max_length=settings.max_length,
        )  # fmt: skip
        return list(found)

    def messages(path: Path) -> list[Messages]:
        return [row["messages"] for row, _ in read_rows(path)]

    if settings.eval_data is not None:
        return load(settings.data), load(settings.eval_data), messages(settings.eval_data)
    examples, gold = load(settings.data), messages(settings.data)
    order = list(range(len(examples)))
    random.Random(settings.seed).shuffle(order)
    kept = order[: len(order) // 10]
    out = set(kept)
    learnt = [example for at, example in enumerate(examples) if at not in out]
    return learnt, [examples[at] for at in kept], [gold[at] for at in kept]


def _report(settings: HealSettings, adapters: AdapterSet, healed: Healed) -> dict[str, Any]:
    scores = {
        when: {
            mode: {
                role: {
                    "loss": found.losses[kind].get(role),
                    "right": found.right[kind][role],
                    "turns": found.turns[kind][role],
                    "interval": wilson(found.right[kind][role], found.turns[kind][role]),
                }
                for role in found.turns[kind]
            }
            for kind, mode in SERVED.items()
        }
        for when, found in (("before", healed.before), ("after", healed.after))
    }
    return {
        "roles": list(adapters.role_names),
        "form_before": adapters.form,
        "closed": healed.closed,
        "tolerance_points": settings.tolerance,
        "tokens": healed.tokens,
        "steps": healed.steps,
        "seconds": healed.seconds,
        **scores,
    }


def _generated(settings: HealSettings, pack: Path, gold: Sequence[Messages]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for when, path in (("before", settings.pack), ("after", pack)):
        found[when] = {}
        for mode in SERVED.values():
            with Engine(settings.model, path, sharing=mode) as engine:
                steps: NextSteps = next_steps(engine, gold)
            low, high = steps.interval()
            found[when][mode] = {
                "right": dict(steps.right), "turns": dict(steps.total), "accuracy": steps.accuracy,
                "interval": [low, high],
            }  # fmt: skip
    return found
