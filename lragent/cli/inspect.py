"""`lragent inspect`: what a pack holds."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lragent.adapter_set import AdapterSet


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the `inspect` command."""
    parser = subparsers.add_parser(
        "inspect",
        help="show what a pack holds",
        description="Check a pack whole and show its roles, ranks, targets, training and size.",
    )
    parser.add_argument("pack", type=Path, metavar="PACK")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from lragent.pack import read_pack

    adapters = read_pack(args.pack)
    facts = describe(adapters, args.pack)
    if args.json:
        print(json.dumps(facts))
    else:
        _print_tables(facts)
    return 0


def describe(adapters: AdapterSet, path: Path) -> dict[str, Any]:
    """The facts about a pack, as JSON can hold them. Ranks, alphas and scalings are lists of the values that occur."""
    return {
        "pack": str(path),
        "base_model": adapters.base_model,
        "base_fingerprint": adapters.base_fingerprint,
        "form": adapters.form,
        "targets": list(adapters.targets),
        "modules": len(adapters.module_paths),
        "shared_rank": _distinct(adapters.rank(p) for p in adapters.module_paths),
        "a_digest": adapters.a_digest(),
        "objective": adapters.objective,
        "prefix_writer": adapters.prefix_writer,
        "dtype": str(adapters.dtype).removeprefix("torch."),
        "file_bytes": path.stat().st_size,
        "weight_bytes": adapters.nbytes(),
        "separate_adapter_bytes": adapters.separate_nbytes(),
        "roles": [_describe_role(adapters, index) for index in range(len(adapters.roles))],
    }


def _describe_role(adapters: AdapterSet, index: int) -> dict[str, Any]:
    role = adapters.roles[index]
    paths = [path for path in adapters.module_paths if role.adapts(path)]
    found = {path.rpartition(".")[2] for path in paths}
    return {
        "name": role.name,
        "alpha": _distinct(role.alpha_of(p) for p in paths),
        "rank": _distinct(role.rank_of(p) for p in paths),
        "rslora": role.rslora,
        "scaling": _distinct(role.scaling(p) for p in paths),
        "targets": [target for target in adapters.targets if target in found],
        "modules": len(paths),
        "digest": adapters.role_digest(role.name),
    }


def _distinct(values: Iterable[float]) -> list[float]:
    return sorted(set(values))


def _print_tables(facts: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(soft_wrap=False)
    about = Table(box=None, show_header=False, pad_edge=False)
    weights, separate = facts["weight_bytes"], facts["separate_adapter_bytes"]
    fingerprint = facts["base_fingerprint"][:12] if facts["base_fingerprint"] else "no fingerprint recorded"
    for name, value in [
        ("pack", facts["pack"]),
        ("base", f"{facts['base_model'] or 'not named'} ({fingerprint})"),
        ("form", f"{facts['form']}, shared A of rank {_listed(facts['shared_rank'])}, {facts['dtype']}"),
        ("targets", f"{', '.join(facts['targets'])} ({facts['modules']} modules)"),
        ("objective", facts["objective"] or "not recorded"),
        ("prefix_writer", facts["prefix_writer"] or "not recorded"),
        ("bytes", f"{weights:,} (separate adapters: {separate:,}; {weights / separate:.0%})"),
    ]:
        about.add_row(name, Text(value, overflow="fold"))
    roles = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("role", "alpha", "rank", "scaling", "targets", "digest"):
        roles.add_column(name)
    for role in facts["roles"]:
        roles.add_row(
            role["name"],
            _listed(role["alpha"]),
            _listed(role["rank"]),
            _listed(role["scaling"]) + (" (rslora)" if role["rslora"] else ""),
            Text(", ".join(role["targets"])),
            role["digest"][:12],
        )
    console.print(about)
    console.print(roles)


def _listed(values: list[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
