"""Files and folders that appear whole or not at all.

Each is written under a temporary name beside its place (so on the same file system), flushed to disk, then renamed.
A process that dies halfway leaves only a name beginning with `.tmp-`, which no reader looks at.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lragent.errors import UserError

TEMPORARY_PREFIX = ".tmp-"

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def write_file(path: Path | str, *chunks: bytes | memoryview) -> None:
    """Write `chunks` one after another as the file `path`, replacing a file that is there.

    Raises `UserError` where the folder cannot be written to or the disk is full.
    """
    path = Path(path)
    temporary = None
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f"{TEMPORARY_PREFIX}{path.name}-", dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)


@contextmanager
def new_folder(path: Path | str, *, keep_existing: bool = False) -> Iterator[Path]:
    """Give a temporary folder to fill; when the block ends well it becomes `path`.

    `path` must not exist, or be an empty folder. With `keep_existing` a folder that another process put there in the
    meantime is kept and ours thrown away. Parents are made. Raises `UserError` where it cannot be written, or is
    there already; an exception in the block leaves nothing behind.
    """
    path = Path(path)
    if not keep_existing:
        refuse_existing(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f"{TEMPORARY_PREFIX}{path.name}-", dir=path.parent))
    except OSError as error:
        raise UserError(f"cannot make the folder {path}: {error.strerror or error}") from error
    try:
        yield temporary
        _sync_tree(temporary, _umask())
        try:
            os.rename(temporary, path)
        except OSError as error:
            if not (keep_existing and error.errno in (errno.ENOTEMPTY, errno.EEXIST)):
                raise UserError(f"cannot make the folder {path}: {error.strerror or error}") from error
        _sync_folder(path.parent)
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise UserError(f"cannot make the folder {path}: {error.strerror}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def refuse_existing(path: Path) -> None:
    """Raise `UserError` unless `path` is free for a new folder: not there, or an empty folder."""
    if path.is_dir() and not any(path.iterdir()):
        return
    if path.exists() or path.is_symlink():
        raise UserError(f"{path} is there already; give a new folder, or remove it first")


def _sync_tree(folder: Path, umask: int) -> None:
    """Flush all files and folders, and give them the permissions of ordinary new ones (libraries make private ones)."""
    for parent, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(parent, name), "rb") as file:
                os.fchmod(file.fileno(), 0o666 & ~umask)
                os.fsync(file.fileno())
        os.chmod(parent, 0o777 & ~umask)
        _sync_folder(Path(parent))


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
