"""What a pack's sharing modes do on real text: loss, next steps and answers, as records that can be merged.

A cell is one pack in one sharing mode. Its records are written together, and a cell that is there is not run again:

- `machine`, one: where, with what commit and versions, and the sha256 of the pack;
- `text-loss`, one for each role: nats per authored token, teacher-forced over held-out trajectories, and these tokens;
- `text-steps`, one for each role: turns that the engine generated exactly, of all turns of these trajectories;
- `text-answers`, one: for each held-out question whether the team's answer was right, its F1, the steps (decisions of
  plan) and how the trajectory ended.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lragent.adapter_set import AdapterSet
from lragent.chat import Renderer
from lragent.errors import UserError
from lragent.eval.agent import ACTION, PLAN, REFLECT, ROLES, Limits
from lragent.eval.analysis.forced import Forced, score
from lragent.eval.ask import free_memory
from lragent.eval.engine_client import engine_complete
from lragent.eval.examine import examine
from lragent.eval.hotpot.answers import exact_match, f1
from lragent.eval.hotpot.split import HELD_OUT, HeldOut, read_held_out
from lragent.eval.machines import MACHINE, machine_record
from lragent.eval.next_step import next_steps
from lragent.eval.records import Record, read_records, write_records
from lragent.models import ModelSource, load_model, load_tokenizer, resolve_model
from lragent.modes import PrefixWriter, SharingMode
from lragent.pack import read_pack
from lragent.serve import Engine
from lragent.serve.engine.build import resolve_prefix_writer
from lragent.train.examples import load_examples

LOSS, STEPS, ANSWERS = "text-loss", "text-steps", "text-answers"
LIMITS = Limits(iterations=10, max_tokens={PLAN: 64, ACTION: 32, REFLECT: 64})
"""What 98 of 100 recorded trajectories and turns keep to."""
LONGEST_TURN = 128
"""Tokens: more than any recorded turn has."""
CELL = ("label", "seed", "mode")
"""What every record says of the cell that it is of."""
WORKERS = 32
"""Trajectories at once."""


@dataclass(frozen=True)
class TextSettings:
    """One pack, measured."""

    data: Path
    """A folder made by `write_split`."""
    roles: Path
    """The pack."""
    label: str
    """How its roles were trained, for people."""
    out: Path
    """The file of records; what it holds already stays."""
    seed: int = 0
    """Of the split and the training, to tell packs of one label apart."""
    model: str | None = None
    modes: tuple[SharingMode, ...] = tuple(SharingMode)
    questions: int | None = None
    """Held-out questions that are asked; None = all."""
    max_tokens_in_cache: int | None = None
    """Of the engine; None = what fits the memory that is free."""

    def __post_init__(self) -> None:
        """Raises UserError naming the field that is out of range."""
        if not self.label:
            raise UserError("label: is empty; say how the roles were trained, for example mixed.")
        if not self.modes:
            raise UserError(f"modes: is empty; name some of {', '.join(SharingMode)}.")
        if self.questions is not None and self.questions < 1:
            raise UserError(f"questions: must be at least 1, not {self.questions}.")


def measure(settings: TextSettings, tell: Callable[[str], None]) -> None:
    """Measure the cells that `settings.out` lacks, and add their records to it, cell by cell.

    Raises UserError where pack, data and model do not fit together or cannot be used.
    """
    held_out = read_held_out(settings.data)
    records = read_records([settings.out], ("kind", *CELL)) if settings.out.exists() else []
    pack = hashlib.sha256(settings.roles.read_bytes()).hexdigest() if settings.roles.is_file() else None
    for record in records:
        ours = (record["kind"], record["label"], record["seed"]) == (MACHINE, settings.label, settings.seed)
        if ours and pack is not None and record.get("pack", pack) != pack:
            raise UserError(
                f"{settings.out}: holds what another pack did as {settings.label}, seed {settings.seed}; give this one "
                "another --label or --seed, or another --output."
            )
    done = {tuple(record[name] for name in CELL) for record in records}
    left = [mode for mode in settings.modes if (settings.label, settings.seed, str(mode)) not in done]
    for mode in settings.modes:
        if mode not in left:
            tell(f"{settings.label}, seed {settings.seed}, {mode}: is in {settings.out} already")
    if not left:
        return
    if not settings.out.parent.is_dir():
        raise UserError(f"{settings.out}: its folder does not exist; make it first.")
    source = resolve_model(settings.model)
    adapters = read_pack(settings.roles, expect_fingerprint=source.fingerprint())
    if missing := [role for role in ROLES if role not in adapters.role_names]:
        raise UserError(f"{settings.roles}: has no role {missing[0]}; the trajectories need {', '.join(ROLES)}.")
    machine = machine_record()
    losses = _losses(settings, source, adapters, left)
    for mode in left:
        cell = {"label": settings.label, "seed": settings.seed, "mode": str(mode)}
        made = [
            machine | cell | {"pack": pack},
            *(
                {"kind": LOSS, **cell, "role": role, "loss": found["loss"], "tokens": found["tokens"]}
                for role, found in losses[mode].items()
            ),
        ]
        with Engine(
            settings.model, settings.roles, sharing=mode, max_tokens_in_cache=settings.max_tokens_in_cache
        ) as engine:
            tell(f"{settings.label}, seed {settings.seed}, {mode}: next steps …")
            found = next_steps(engine, held_out.trajectories, max_tokens=LONGEST_TURN)
            made += [
                {"kind": STEPS, **cell, "role": role, "right": found.right[role], "turns": turns}
                for role, turns in found.total.items()
            ]
            tell(f"{settings.label}, seed {settings.seed}, {mode}: answers …")
            answers = _answers(engine, held_out, settings.questions)
            made.append({"kind": ANSWERS, **cell, "questions": answers})
        records += made
        write_records(settings.out, records)
        tell(f"  {sum(answer['right'] for answer in answers)} of {len(answers)} answers are right")


def _losses(
    settings: TextSettings, source: ModelSource, adapters: AdapterSet, modes: Sequence[SharingMode]
) -> dict[SharingMode, dict[str, dict[str, float]]]:
    """By mode and role: loss and tokens. The model is gone again when the engines come."""
    renderer = Renderer(load_tokenizer(source))
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    forced = Forced(load_model(source, None, device), adapters)
    found = {}
    for mode in modes:
        # As the engine has it: where every role writes for itself, none but the role that asks writes the prefix.
        writer = resolve_prefix_writer(None, adapters) if mode.one_writer_per_token else PrefixWriter.FIRST
        examples = load_examples(
            settings.data / HELD_OUT, renderer, adapters.role_names, objective="shared", prefix_writer=writer
        )
        scores = score(forced, examples, mode)
        found[mode] = {role: scores[role] for role in adapters.role_names if role in scores}
    del forced
    free_memory()
    return found


def _answers(engine: Engine, held_out: HeldOut, count: int | None) -> list[Record]:
    questions = held_out.questions[:count]
    # A salt of its own: what the next steps left in the cache would be found again, with another writer's hand on it.
    done = examine(held_out, questions, engine_complete(engine, salt="answers"), LIMITS, workers=WORKERS)
    return [
        {
            "id": question.id,
            "right": exact_match(episode.answer, question.answers),
            "f1": f1(episode.answer, question.answers),
            "steps": episode.iterations,
            "ending": str(episode.ending),
        }
        for question, episode in zip(done.questions, done.episodes, strict=True)
    ]
