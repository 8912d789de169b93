"""On what a measurement was made: the facts that go beside every number."""

from __future__ import annotations

import json
import platform
import re
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lragent.atomic import write_file

PACKAGES = ("torch", "transformers", "peft")
RESULTS = Path(__file__).resolve().parent / "results"
"""Where measurements are kept, in the checkout."""


def facts(device: torch.device) -> dict[str, Any]:
    """Machine, threads, versions and commit."""
    return {
        "machine": machine_name(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "commit": commit(),
    }


def machine_name(device: torch.device) -> str:
    """The GPU's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def commit() -> str | None:
    """The checkout's commit, marked where files differ from it; None outside of one."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude", "*"],
            cwd=RESULTS.parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()


def save(name: str, numbers: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write `numbers`, which hold `facts`, to `<name>-<machine>.json` in `folder`; gives the path."""
    machine = re.sub(r"[^a-z0-9]+", "-", str(numbers["machine"]).lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{machine}.json"
    write_file(path, json.dumps(numbers, indent=2).encode() + b"\n")
    return path
