"""Where rows of training data come from: files, folders and patterns of files, or a dataset of the hub."""

from __future__ import annotations

import glob
import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lragent.errors import UserError
from lragent.trajectories import parse_row

ENDINGS = (".jsonl", ".json", ".parquet")
"""Of the files that are taken from a folder."""

_HUB = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?(@(?P<split>[\w.+-]+))?")


@dataclass(frozen=True)
class HubSource:
    """A dataset of the hub: `org/name`, `org/name:config`, `org/name@split`."""

    name: str
    config: str | None
    split: str

    def __str__(self) -> str:
        return f"{self.name}[{self.split}]"


def locate(spec: Path | str) -> list[Path] | HubSource:
    """What `data` names. A path, where there is one, goes before a dataset of that name.

    Raises UserError where it is neither, or a folder or pattern without files.
    """
    text, path = str(spec), Path(spec)
    if path.is_file():
        return [path]
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.suffix in ENDINGS)
        if not found:
            raise UserError(f"{path}: holds no file that ends in {', '.join(ENDINGS)}.")
        return found
    if glob.has_magic(text):
        if files := sorted(Path(name) for name in glob.glob(text, recursive=True)):
            return files
        raise UserError(f"{text}: no file has such a name.")
    match = _HUB.fullmatch(text)
    if match is None or text.startswith((".", "/", "~")) or path.suffix in ENDINGS:
        raise UserError(
            f"{text}: is not a file; give a JSONL or Parquet file of trajectories, a folder or pattern of them, or a "
            "dataset of the hub (org/name)."
        )
    return HubSource(match["name"], match["config"], match["split"] or "train")


def read_rows(spec: Path | str, on_error: Callable[[str], None] | None = None) -> Iterator[tuple[Any, str]]:
    """Yield every row of what `spec` names, one at a time, and where it stands: "file:line" (in Parquet: the row's
    number), or "org/name[split]:row", all counted from 1.

    Raises UserError naming the place for what cannot be found or read; a line that is no JSON is told to `on_error`,
    where that is given, and passed over.
    """
    found = locate(spec)
    if isinstance(found, HubSource):
        yield from _hub_rows(found)
    else:
        for path in found:
            yield from _file_rows(path, on_error)


def content_digest(spec: Path | str) -> str:
    """What the rows are, as one digest: of the bytes of all files, or of the dataset's revision."""
    found = locate(spec)
    digest = hashlib.sha256()
    if isinstance(found, HubSource):
        digest.update(f"{found.name} {found.config} {found.split} {_revision(found)}".encode())
        return digest.hexdigest()
    for path in found:
        try:
            with path.open("rb") as file:
                digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}).") from error
    return digest.hexdigest()


def _file_rows(path: Path, on_error: Callable[[str], None] | None) -> Iterator[tuple[Any, str]]:
    import datasets  # slow to import

    parquet = path.suffix == ".parquet"
    try:
        # JSONL is read as lines of text: read as JSON, rows would have to share one set of columns and types,
        # and errors could not name the line.
        rows = datasets.load_dataset(
            "parquet" if parquet else "text", data_files={"train": [str(path)]}, split="train", streaming=True
        )
        for line, row in enumerate(rows, start=1):
            source = f"{path}:{line}"
            if parquet:
                yield row, source
            elif row["text"].strip():
                try:
                    parsed = parse_row(row["text"], source=source)
                except UserError as error:
                    if on_error is None:
                        raise
                    on_error(str(error))
                    continue
                yield parsed, source
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:  # arrow's and Unicode's are ValueErrors
        kind = "a Parquet file" if parquet else "UTF-8 text"
        raise UserError(f"{path}: cannot be read as {kind} ({error}).") from error


def _hub_rows(source: HubSource) -> Iterator[tuple[Any, str]]:
    import datasets

    try:
        rows = datasets.load_dataset(source.name, source.config, split=source.split, streaming=True)
        for number, row in enumerate(rows, start=1):
            yield row, f"{source}:{number}"
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        raise _unreachable(source, error) from error


def _revision(source: HubSource) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return str(HfApi().dataset_info(source.name).sha)
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise _unreachable(source, error) from error


def _unreachable(source: HubSource, error: Exception) -> UserError:
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return UserError(
        f"{source.name}: is no file here, and the hub does not give it as a dataset ({first}); give the path of a "
        "file, or log in (`hf auth login`) where it is private."
    )
