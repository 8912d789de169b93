"""Roles given one by one, as vLLM's users give theirs: `name=path` of a PEFT folder, or of a pack with that role."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from lragent.adapter_set import AdapterSet
from lragent.errors import UserError
from lragent.pack import read_pack
from lragent.peft_io import one_set, read_peft_folder
from lragent.stacking import unstack


def read_lora_modules(given: Sequence[str], fingerprint: str | None) -> tuple[AdapterSet, dict[str, str]]:
    """All roles as one set, tied where their A's agree and stacked else, and where each was read.

    fingerprint: of the base. Raises UserError naming the one that is wrong.
    """
    singles: dict[str, AdapterSet] = {}
    roots: dict[str, str] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            raise UserError(f"lora_modules: {text!r} is not NAME=PATH.")
        if name in singles:
            raise UserError(f"lora_modules: the role name {name!r} is used twice.")
        singles[name] = read_peft_folder(path, name) if Path(path).is_dir() else _of_pack(path, name)
        roots[name] = path
    return one_set(singles, stack=True, base_fingerprint=fingerprint), roots


def _of_pack(path: str, name: str) -> AdapterSet:
    """One role of a pack as a set of its own: the role of that name, or the only one."""
    adapters = read_pack(path)
    single = unstack(adapters)[0 if len(adapters.roles) == 1 else adapters.role_index(name)]
    return dataclasses.replace(single, roles=(dataclasses.replace(single.roles[0], name=name),))
