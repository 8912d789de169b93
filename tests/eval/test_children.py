"""Programs that the demo starts are gone when it ends, and their failures are told."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from lragent.eval.children import Child, ChildError

GRANDCHILD = (
    "import subprocess, sys, time; "
    "print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).pid, flush=True); "
)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def runs(pid: int) -> bool:
    """Whether the process is there and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until_gone(pid: int) -> None:
    end = time.monotonic() + 10
    while runs(pid) and time.monotonic() < end:
        time.sleep(0.02)
    assert not runs(pid)


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_nothing_runs_on_after_the_block(error: type[BaseException] | None, tmp_path: Path) -> None:
    pid = 0
    try:
        with Child(python(GRANDCHILD + "time.sleep(60)"), tmp_path / "log") as child:
            pid = int(child.wait_for(r"(\d+)\n", timeout_s=20))
            assert runs(pid)
            if error is not None:
                raise error
    except KeyboardInterrupt:
        pass
    wait_until_gone(pid)


def test_what_a_dead_leader_left_behind_is_ended_too(tmp_path: Path) -> None:
    with Child(python(GRANDCHILD), tmp_path / "log") as child:
        child.finish()
        pid = int(child.text)
        assert runs(pid)
    wait_until_gone(pid)


def test_a_failure_is_told_with_the_end_of_the_log(tmp_path: Path) -> None:
    code = "print('first'); [print(i) for i in range(40)]; raise SystemExit('no such model')"
    with (
        Child(python(code), tmp_path / "log") as child,
        pytest.raises(ChildError, match="ended with status 1") as caught,
    ):
        child.finish()
    assert "log" in str(caught.value)
    assert "no such model" in caught.value.tail
    assert "first" not in caught.value.tail


def test_one_that_ends_or_takes_too_long_is_not_waited_for(tmp_path: Path) -> None:
    with (
        Child(python("print('no')"), tmp_path / "log") as child,
        pytest.raises(ChildError, match="before it was ready"),
    ):
        child.wait_for("(yes)", timeout_s=20)
    slow = python("import time; time.sleep(60)")
    with Child(slow, tmp_path / "log") as child, pytest.raises(ChildError, match="not ready after"):
        child.wait_for("(yes)", timeout_s=0.2)


def test_a_program_that_announces_itself_and_ends_is_heard(tmp_path: Path) -> None:
    with Child(python("print('yes')"), tmp_path / "log", extra_env={"X": "1"}) as child:
        assert child.wait_for("(yes)", timeout_s=20) == "yes"
    assert "X" not in os.environ
