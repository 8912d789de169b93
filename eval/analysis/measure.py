"""Caches and next tokens of one pack along trajectories: everything that `lragent eval caches` writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lragent.bench.machine import facts
from lragent.chat import Renderer
from lragent.eval.analysis.divergence import divergences, examples_by_mode, records
from lragent.eval.analysis.forced import Forced
from lragent.eval.analysis.similarity import Similarity
from lragent.models import load_model, load_tokenizer, resolve_model
from lragent.modes import PrefixWriter, SharingMode
from lragent.pack import read_pack
from lragent.train.data import Example
from lragent.train.examples import load_examples

DTYPE = torch.float32
"""So that what is measured is sharing, not rounding."""


def measure(
    pack: Path, data: Path, *, model: str | None, trajectories: int, label: str | None, device: torch.device
) -> list[dict[str, Any]]:
    """Run the first `trajectories` of `data`; records of kinds `similarity` and `divergence` under `label`, after one
    of kind `caches` that says what was measured on what.

    model: as `resolve_model` takes it. label: None = what the pack was trained for. Raises UserError where pack, data
    and model do not fit together.
    """
    here = facts(device)  # of what begins to measure, whatever becomes of the checkout meanwhile
    source = resolve_model(model)
    adapters = read_pack(pack, expect_fingerprint=source.fingerprint())
    renderer = Renderer(load_tokenizer(source))
    prefix_writer = PrefixWriter(adapters.prefix_writer or PrefixWriter.BASE)

    def load(writer: PrefixWriter) -> list[Example]:
        # `shared`: a row must be a whole trajectory, whatever the pack was trained for.
        found = load_examples(data, renderer, adapters.role_names, objective="shared", prefix_writer=writer)
        return [found[at] for at in range(min(trajectories, len(found)))]

    examples = examples_by_mode(load, prefix_writer)
    forced = Forced(load_model(source, DTYPE, device), adapters)
    label = label or adapters.objective or pack.stem
    similarity, served = Similarity(forced.names), examples[SharingMode.BASE_LR_SHARED]
    for example in tqdm(served, desc="caches", unit=" trajectories", delay=1):
        forced.caches(example, similarity.add)
    found = divergences(forced, examples)
    moved = list(tqdm(found, desc="next tokens", unit=" trajectories", total=len(served), delay=1))
    about = {
        "kind": "caches", "label": label, "pack": pack.name, "objective": adapters.objective, "form": adapters.form,
        "prefix_writer": prefix_writer.value, "model": source.name, "data": data.name, "trajectories": len(served),
        "tokens": sum(map(len, served)), "dtype": str(DTYPE).removeprefix("torch."), **here,
    }  # fmt: skip
    return [about, *similarity.records(label), *records(moved, forced.names, label)]
