"""Runs of training as users start them: by accelerate's launcher, from a config in configs/accelerate/."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml

import lragent.train
from lragent.bench import machine
from lragent.errors import LRAgentError, UserError

ENTRY = Path(lragent.train.__file__).parent / "train_roles.py"
CONFIGS = machine.RESULTS.parents[1] / "configs" / "accelerate"
PATIENCE = 0.1
"""Seconds between two looks at a run."""


@dataclass(frozen=True)
class Launched:
    """A run that has ended.

    rows: the metrics of its steps. summary: its last line of output, empty where it was stopped. wall_s: seconds from
    the launch to the end of the last process.
    """

    rows: list[dict[str, Any]]
    summary: dict[str, Any]
    wall_s: float


def accelerate_config(strategy: str, gpus: int, place: Path) -> Path:
    """The config of a strategy, `one` or a word in the names of configs/accelerate/.

    Without a GPU a copy of it, in `place`, runs it on the CPU. Raises UserError where there is no such config.
    """
    path = CONFIGS / ("gpu_1.yaml" if strategy == "one" else f"gpu_{gpus}_{strategy}.yaml")
    if not path.is_file():
        raise UserError(f"there is no {path}: take another strategy, or another number of GPUs.")
    if torch.cuda.is_available():
        return path
    copy = place / path.name
    copy.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"use_cpu": True}))
    return copy


def launch(
    config: Path,
    out: Path,
    words: Sequence[str],
    *,
    limit_s: float,
    resume: bool = False,
    stop_after: int | None = None,
) -> Launched:
    """Train into the folder `out`; what is printed goes to files beside it.

    words: `key=value` settings. stop_after: steps after which the processes are asked to end, as a cluster does that
    takes a machine back. Raises LRAgentError with the last of what was printed where the run fails, or does not end
    within `limit_s` seconds; nothing of it runs on then.
    """
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += ["--main_process_port", "0", str(ENTRY), *words, f"out={out}", *(["--resume", "auto"] if resume else [])]
    began = time.monotonic()
    partial = out.with_name(out.name + ".partial") / "metrics.jsonl"
    printed, errors = (out.with_name(f"{out.name}.{ending}") for ending in ("out", "err"))
    with printed.open("w") as stdout, errors.open("w") as stderr:
        process = subprocess.Popen(command, stdout=stdout, stderr=stderr, env=_environment())
        try:
            asked = False
            while process.poll() is None:
                if time.monotonic() - began > limit_s:
                    raise LRAgentError(f"did not end within {limit_s:.0f} s; {_tail(errors)}")
                if stop_after is not None and not asked and len(_rows(partial)) >= stop_after:
                    for training in _trainings(process.pid):
                        training.send_signal(signal.SIGTERM)
                    asked = True
                time.sleep(PATIENCE)
        finally:
            _end(process)
    wall_s = time.monotonic() - began
    if stop_after is not None:
        if not partial.is_file():
            raise LRAgentError(f"left nothing to go on from when it was stopped; {_tail(errors)}")
        return Launched(_rows(partial), {}, wall_s)
    if process.returncode != 0:
        raise LRAgentError(f"ended with {process.returncode}; {_tail(errors)}")
    summary = json.loads(printed.read_text().splitlines()[-1])
    return Launched(_rows(out / "metrics.jsonl"), summary, wall_s)


def _environment() -> dict[str, str]:
    """This process's own. Without a GPU every process has one thread, so that they do not wait for one another's."""
    if torch.cuda.is_available():
        return dict(os.environ)
    return os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def _rows(path: Path) -> list[dict[str, Any]]:
    """The steps in a file of metrics that may still be written, or not be there yet."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [row for row in (json.loads(line) for line in lines if line.endswith("\n")) if "loss" in row]


def _trainings(launcher: int) -> list[psutil.Process]:
    """The processes that train, not those that launched them."""
    found = []
    for process in psutil.Process(launcher).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if str(ENTRY) in process.cmdline()[:3]:  # "python -u train_roles.py …"
                found.append(process)
    return found


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of a run: the launcher gives each process a session of its own."""
    if process.poll() is None:
        for each in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        process.wait()


def _tail(path: Path) -> str:
    """The end of a file of errors: what went wrong stands before what the launcher makes of it."""
    return f"it last printed:\n{path.read_text(errors='replace')[-8000:]}"
