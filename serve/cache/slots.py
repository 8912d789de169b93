"""Which slots of a pool are free. A slot is where one token's cache lives; its page size is one token."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lragent.serve.cache.runs import FreeRuns, OutOfSlotsError, Slots


class SlotPool:
    """Allocates slots.

    Every allocation of a slot gets a new serial number: a reference that names slot and serial can tell a slot that was
    freed and used again from the one it meant.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.serial: npt.NDArray[np.int64] = np.zeros(size, dtype=np.int64)
        self._next_serial = 1
        self._free = FreeRuns(size)
        self._free.put(np.arange(size, dtype=np.int32))

    @property
    def free_count(self) -> int:
        """Slots that are free."""
        return self._free.count

    @property
    def used_count(self) -> int:
        """Slots that are allocated."""
        return self.size - self._free.count

    def allocate(self, count: int, after: int | None = None) -> Slots:
        """`count` free slots, the run behind slot `after` first (to prolong what lies there), then the longest runs.

        Raises OutOfSlotsError.
        """
        slots = self._free.take(count, after)
        self.serial[slots] = np.arange(self._next_serial, self._next_serial + count)
        self._next_serial += count
        return slots

    def free(self, slots: Slots) -> None:
        """Give slots back. Raises LRAgentError, with nothing freed, where one is free already or out of range."""
        self._free.put(slots)

    def check_integrity(self) -> None:
        """Raises AssertionError if what is free is not what it says."""
        self._free.check_integrity()

    def free_slots(self) -> Slots:
        """Every free slot, in order."""
        return self._free.free()


__all__ = ["OutOfSlotsError", "SlotPool", "Slots"]
