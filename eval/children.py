"""Programs that the demo starts: each in a process group of its own, which is gone when its block is left."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from lragent.errors import LRAgentError

_GRACE_S = 8.0
"""Seconds between asking a group to end and killing it."""


class ChildError(LRAgentError):
    """A program failed. `tail` is the end of what it wrote."""

    def __init__(self, sentence: str, tail: str) -> None:
        super().__init__(sentence)
        self.tail = tail


class Child:
    """A running program and its log, to be used in a `with` block: when it is left, however, nothing of it runs on.

    Its own session keeps a terminal's Ctrl-C from reaching it before us, and lets everything that it starts be ended.
    """

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        *,
        errors_visible: bool = False,
        extra_env: Mapping[str, str] | None = None,
    ) -> None:
        """Standard output goes to `log`, and so do errors and progress unless `errors_visible` leaves them ours."""
        self.log = log
        self._name = Path(command[0]).name
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=None if errors_visible else out,
                start_new_session=True,
                env={**os.environ, **(extra_env or {})},
            )

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def text(self) -> str:
        """What it has written to the log."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def finish(self) -> None:
        """Wait for the end. Raises `ChildError` where its status is not 0."""
        if self._process.wait() != 0:
            raise self.failure(f"{self._name} ended with status {self._process.returncode}")

    def wait_for(self, pattern: str, timeout_s: float) -> str:
        """Wait until the log matches; gives the first group. Raises `ChildError` if it ends or takes too long."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            ended = self._process.poll() is not None
            if match := re.search(pattern, self.text):
                return match[1]
            if ended:
                raise self.failure(f"{self._name} ended with status {self._process.returncode} before it was ready")
            time.sleep(0.05)
        raise self.failure(f"{self._name} was not ready after {timeout_s:.0f} seconds")

    def failure(self, sentence: str) -> ChildError:
        """The error to raise, with the end of the log."""
        tail = "\n".join(self.text.splitlines()[-20:])
        return ChildError(f"{sentence}; its output is in {self.log}", tail)

    def stop(self) -> None:
        """End the program and all that it started."""
        self._signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_GRACE_S)
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)
