"""Whoever of a study's processes is killed: the others end, or go on, and nobody waits for ever."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from tiny import save_tiny

from lragent.eval.answers import read_answers

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


@contextmanager
def study(place: Path) -> Iterator[subprocess.Popen[str]]:
    """The command with two processes, at work for longer than any test looks."""
    model = place / "tiny"
    if not model.exists():
        save_tiny(model)
    plan = [
        "level=demo", "train=20", "test=400", "questions=400", "regimes=[shared]", "modes=[non_shared,base_lr_shared]",
        f"training.model={model}", "training.dtype=float32", "training.epochs=1", "asking.workers=2",
        "asking.iterations=8", "asking.max_tokens_in_cache=8000",
    ]  # fmt: skip
    command = [sys.executable, "-m", "lragent.cli.main", "eval", "study", "-o", str(place / "s"), "--processes", "2"]
    process = subprocess.Popen(
        [*command, *plan], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    children: list[psutil.Process] = []
    try:
        children = wait_for(lambda: workers_of(process), 60)
        yield process
    finally:
        for each in (process, *children):
            if each.poll() is None if isinstance(each, subprocess.Popen) else each.is_running():
                each.kill()
        process.communicate()


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The two processes of the study, once they are at work on an answer each."""
    found = [child for child in psutil.Process(process.pid).children() if "spawn_main" in " ".join(child.cmdline())]
    return found if len(found) == 2 else []


def wait_for(look: Callable[[], list[psutil.Process]], seconds: float) -> list[psutil.Process]:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := look():
            return found
        time.sleep(0.1)
    raise AssertionError("it took too long")


def wait_for_answers(place: Path) -> None:
    """Until both modes are asked."""
    end = time.monotonic() + 90
    while len([path for path in (place / "s").rglob("*.jsonl") if path.parent.name == "answers"]) < 2:
        assert time.monotonic() < end, "no answers"
        time.sleep(0.1)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_is_at_work_when_the_command_has_ended(number: signal.Signals, tmp_path: Path) -> None:
    with study(tmp_path) as process:
        workers = workers_of(process)
        wait_for_answers(tmp_path)
        if number is signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does it
        else:
            process.send_signal(number)
        out, _ = process.communicate(timeout=30)
        gone, alive = psutil.wait_procs(workers, timeout=10)
        assert (len(gone), alive) == (2, [])
        assert "Traceback" not in out
        for path in (tmp_path / "s").rglob("answers/*.jsonl"):
            read_answers(path)


def test_one_that_is_killed_does_not_keep_the_others(tmp_path: Path) -> None:
    with study(tmp_path) as process:
        one, other = workers_of(process)
        wait_for_answers(tmp_path)
        one.kill()
        psutil.wait_procs([one], timeout=10)
        time.sleep(1)
        assert process.poll() is None
        assert other.is_running(), "what it works on is not lost"
        other.kill()
        out, _ = process.communicate(timeout=30)
        assert process.returncode == 2
        assert "a process of the study has failed" in out
