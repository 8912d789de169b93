"""The ledger's file: SQLite in WAL mode, written by one thread in few transactions, read beside it."""

from __future__ import annotations

import logging
import queue
import sqlite3
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import filelock

from lragent.errors import UserError
from lragent.serve.ledger.entry import COLUMNS, GROUPS, SUMS, Entry

logger = logging.getLogger(__name__)

VERSION = 1
MOST_PENDING = 10_000
"""Entries that may wait for a disk that cannot be written; then no more requests are taken."""
_BATCH = 512
_RETRY_S = 1.0
_TYPES = {"str": "TEXT", "int": "INTEGER", "float": "REAL", "float | None": "REAL"}


@dataclass(frozen=True)
class Sums:
    """Entries added up. values: by the names of `SUMS`."""

    name: str
    requests: int
    values: dict[str, Any]


class LedgerStore:
    """One ledger file, held by one server at a time. All methods may be called from any thread.

    What is appended is on disk, beyond a crash of this process, once its future is done.
    """

    def __init__(self, path: Path) -> None:
        """Open or make the file. Raises UserError naming it where that cannot be done."""
        self.path = path
        self._held = filelock.FileLock(f"{path}.lock")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._held.acquire(blocking=False)
        except filelock.Timeout:
            raise UserError(f"ledger: {path} is in use by another server; give each server its own file.") from None
        except OSError as error:
            raise UserError(f"ledger: {path} cannot be used ({error.strerror}).") from None
        try:
            self._writing, self._reading = self._open(), self._open()
            self._check()
        except (sqlite3.Error, UserError) as error:
            self._held.release()
            if isinstance(error, UserError):
                raise
            raise UserError(f"ledger: {path} cannot be used ({error}).") from None
        self._read_lock = threading.Lock()
        self._inbox: queue.SimpleQueue[tuple[Entry, Future[None]] | Future[None] | None] = queue.SimpleQueue()
        self.pending = 0
        """Entries that are not on disk yet."""
        self._pending_lock = threading.Lock()
        self._closing = False
        self._thread = threading.Thread(target=self._write_all, name="lragent-ledger", daemon=True)
        self._thread.start()

    def append(self, entry: Entry) -> Future[None]:
        """Queue an entry. The future is done once it is on disk; where that fails it is tried again, and the future
        says why."""
        done: Future[None] = Future()
        with self._pending_lock:
            self.pending += 1
        self._inbox.put((entry, done))
        return done

    def flush(self, timeout_s: float = 10.0) -> None:
        """Wait until all that was appended is on disk, or could not be written at the first try."""
        done: Future[None] = Future()
        self._inbox.put(done)
        done.result(timeout_s)

    def close(self) -> None:
        """Write what is left, and let go of the file."""
        if self._closing:
            return
        self._closing = True
        self._inbox.put(None)
        self._thread.join(10.0)
        with self._read_lock:
            self._reading.close()
        self._held.release()

    def sums(self, *, where: dict[str, str] | None = None, since: float = 0.0, until: float | None = None) -> Sums:
        """All entries that fit, added up. where: exact values of `run` and `GROUPS`. since, until: Unix times."""
        return self._sums(None, where, since, until, 1)[0]

    def groups(
        self,
        group: str,
        *,
        where: dict[str, str] | None = None,
        since: float = 0.0,
        until: float | None = None,
        limit: int = 1000,
    ) -> list[Sums]:
        """The same for each value of `group`, one of `GROUPS`, the dearest first."""
        if group not in GROUPS:
            raise UserError(f"group_by: must be one of {', '.join(GROUPS)}, not {group!r}.")
        return self._sums(group, where, since, until, limit)

    def _sums(
        self, group: str | None, where: dict[str, str] | None, since: float, until: float | None, limit: int
    ) -> list[Sums]:
        # Column names are this module's own; values are always bound.
        conditions, values = ["ended_at >= ?"], [since]
        if until is not None:
            conditions.append("ended_at < ?")
            values.append(until)
        for column, value in (where or {}).items():
            assert column in (*GROUPS, "run")
            conditions.append(f'"{column}" = ?')
            values.append(value)  # type: ignore[arg-type]  # SQLite takes both
        columns = ", ".join(f"COALESCE(SUM({name}), 0)" for name in SUMS)
        head = f'"{group}"' if group else "''"
        tail = f' GROUP BY "{group}" ORDER BY SUM(cost) DESC, "{group}" LIMIT {int(limit)}' if group else ""
        statement = f"SELECT {head}, COUNT(*), {columns} FROM entries WHERE {' AND '.join(conditions)}{tail}"
        with self._read_lock:
            rows = self._reading.execute(statement, values).fetchall()
        return [Sums(row[0], row[1], dict(zip(SUMS, row[2:], strict=True))) for row in rows]

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, check_same_thread=False, isolation_level=None, timeout=5.0)
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")
        return connection

    def _check(self) -> None:
        (version,) = self._writing.execute("PRAGMA user_version").fetchone()
        tables = {name for (name,) in self._writing.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if version == 0 and not tables:
            columns = ", ".join(f'"{name}" {_TYPES[Entry.__annotations__[name]]}' for name in COLUMNS)
            self._writing.execute("BEGIN IMMEDIATE")
            self._writing.execute(f"CREATE TABLE entries ({columns})")
            for name in (*GROUPS, "ended_at"):
                self._writing.execute(f'CREATE INDEX "by_{name}" ON entries ("{name}")')
            self._writing.execute(f"PRAGMA user_version = {VERSION}")
            self._writing.execute("COMMIT")
        elif version != VERSION or "entries" not in tables:
            raise UserError(
                f"ledger: {self.path} is no ledger of this version (it says {version}, this is {VERSION}); "
                "give another file."
            )

    def _write_all(self) -> None:
        """The writer's thread: whatever has come meanwhile goes into one transaction."""
        failing: list[tuple[Entry, Future[None]]] = []
        ending = False
        while not ending:
            batch, waiting = failing, []
            try:
                item = self._inbox.get(timeout=_RETRY_S if failing else None)
                while True:
                    if item is None:
                        ending = True
                    elif isinstance(item, Future):
                        waiting.append(item)
                    else:
                        batch.append(item)
                    if len(batch) >= _BATCH:
                        break
                    item = self._inbox.get_nowait()
            except queue.Empty:
                pass
            failing = [] if self._written(batch) else batch
            for each in waiting:
                each.set_result(None)
        if failing:
            logger.error("%d entries of the ledger could not be written and are lost", len(failing))
        self._writing.close()

    def _written(self, batch: Sequence[tuple[Entry, Future[None]]]) -> bool:
        if not batch:
            return True
        places = ", ".join("?" * len(COLUMNS))
        try:
            self._writing.execute("BEGIN IMMEDIATE")
            self._writing.executemany(f"INSERT INTO entries VALUES ({places})", [astuple(entry) for entry, _ in batch])
            self._writing.execute("COMMIT")
        except sqlite3.Error as error:
            if self._writing.in_transaction:
                self._writing.execute("ROLLBACK")
            fresh = [done for _, done in batch if not done.done()]
            if fresh:
                logger.error("the ledger cannot be written and is tried again: %s", error)
            for done in fresh:
                done.set_exception(error)
            return False
        with self._pending_lock:
            self.pending -= len(batch)
        for _, done in batch:
            if not done.done():
                done.set_result(None)
        return True


def new_run() -> str:
    """A name for the life of a server."""
    return f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{time.time_ns() % 10**9:09d}"
