"""Reading safetensors files that nobody vouches for: regular files only, never a size from the file taken on trust."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from lragent.errors import UserError

MAX_HEADER_BYTES = 32 << 20
"""Bounds what a header may claim; the largest published checkpoints stay below 5 MB a file."""

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies in a file."""

    dtype: str
    """As safetensors spells it, for example "F32"."""
    shape: tuple[int, ...]
    begin: int
    end: int
    """Half-open byte range, counted from the start of the file."""


@dataclass(frozen=True)
class Header:
    """A parsed safetensors header."""

    raw: bytes
    metadata: dict[str, str]
    tensors: dict[str, TensorEntry]
    data_begin: int
    """Where the tensors' bytes begin in the file."""


def open_regular(path: Path | str) -> BufferedReader:
    """Open a regular file for reading; a folder, FIFO or device is refused, and never waited for.

    Raises `UserError` naming the file.
    """
    if Path(path).suffix in PICKLE_SUFFIXES:
        raise UserError(
            f"{path} is a pickle by its name, and reading a pickle can run code: save it as safetensors instead"
        )
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(f"{path} is not a regular file; give the file itself")
    return os.fdopen(descriptor, "rb")


def read_header(file: BufferedReader, path: Path | str) -> Header:
    """Parse the header of an open safetensors file and check every byte range in it against the file's size.

    Raises `UserError` naming `path` where it is no safetensors file, is cut short, or is a pickle.
    """
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or not 2 <= length <= MAX_HEADER_BYTES:
        kind = "a pickle, not a safetensors file" if _pickled(start) else "not a safetensors file"
        raise UserError(f"{path} is {kind}; give one that was saved as safetensors")
    if 8 + length > size:
        raise UserError(f"{path} is cut short or damaged: its header is longer than the file; copy it again")
    raw = file.read(length)
    try:
        parsed = json.loads(raw)
        metadata = parsed.pop("__metadata__", {})
        tensors = {name: _entry(value, 8 + length) for name, value in parsed.items()}
        if not all(isinstance(v, str) for v in metadata.values()):
            raise TypeError("metadata values must be strings")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is not a safetensors file, or its header is damaged; copy it again") from error
    end = 8 + length
    for entry in sorted(tensors.values(), key=lambda e: (e.begin, e.end)):
        if entry.begin != end or entry.end < entry.begin:
            raise UserError(f"{path} is damaged: its tensors do not lie one after another; copy it again")
        end = entry.end
    if end != size:
        word = "cut short" if end > size else "damaged"
        raise UserError(f"{path} is {word}: it should have {end} bytes and has {size}; copy it again")
    return Header(raw=raw, metadata=metadata, tensors=tensors, data_begin=8 + length)


def _entry(value: dict[str, Any], data_begin: int) -> TensorEntry:
    begin, end = value["data_offsets"]
    if set(value) != {"dtype", "shape", "data_offsets"} or not isinstance(value["dtype"], str):
        raise ValueError("a tensor's entry has other fields")
    if not all(type(n) is int and n >= 0 for n in (begin, end, *value["shape"])):
        raise ValueError("sizes must be whole numbers")
    return TensorEntry(value["dtype"], tuple(value["shape"]), data_begin + begin, data_begin + end)


def _pickled(start: bytes) -> bool:
    """Whether a file that begins so is a pickle (protocol 2 and later) or torch's zip of one."""
    return start[:4] == b"PK\x03\x04" or (start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"))
