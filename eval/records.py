"""Records: what a measurement found, a JSON object with a `kind` to a line, of which reports are made."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lragent.atomic import write_file
from lragent.errors import UserError

Record = dict[str, Any]


def read_records(paths: Sequence[Path], fields: Sequence[str] = ("kind",)) -> list[Record]:
    """The records in files, one after another. Raises UserError naming the line that has not all of `fields`."""
    records = []
    for path in paths:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read ({error}).") from error
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
                for field in fields:
                    record[field]
            except (ValueError, TypeError, KeyError) as error:
                wanted = ", ".join(f"`{field}`" for field in fields)
                raise UserError(f"{path}:{number}: is no record with {wanted} ({error}); give another file.") from error
            records.append(record)
    return records


def write_records(path: Path, records: Iterable[Record]) -> None:
    """All at once, or nothing."""
    write_file(path, "".join(json.dumps(record) + "\n" for record in records).encode())
