"""A polite request to end: SIGTERM (a cluster takes the machine back) or Ctrl-C."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class InterruptedRun(Exception):  # noqa: N818 - not an error: it was asked for
    """The run was asked to end, and did so between two steps."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number
        """Of the signal."""


class Interrupt:
    """Remembers the first such signal; a second one acts as it always does."""

    number = 0
    """Of the signal; 0 where none came."""

    @contextmanager
    def watched(self) -> Iterator[Interrupt]:
        """Watch for signals. Outside of the main thread, where none arrive, do nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._remember) for number in (signal.SIGTERM, signal.SIGINT)}
        self._before = before
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        for each, handler in self._before.items():
            signal.signal(each, handler)
