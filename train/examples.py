"""All examples of a data set, rendered once and kept in a file that is mapped, not read, into memory.

The file lies in the cache (`$LRAGENT_CACHE`), under a digest of everything that the examples depend on: the rows, the
tokenizer and its chat template, the roles, who writes the prefix, and where trajectories are cut off. So a second run
begins at once, the processes of one machine share one copy, and what has changed is rendered anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import filelock
import safetensors
import safetensors.torch
import torch
from tqdm import tqdm

from lragent.adapter_set import Objective
from lragent.atomic import write_file
from lragent.chat import Renderer
from lragent.errors import UserError
from lragent.models.cache import cache_root
from lragent.modes import PrefixWriter
from lragent.train.data import Example, example_of
from lragent.train.rows import content_digest, read_rows
from lragent.trajectories import read_row

VERSION = 1
KEPT = 32
"""Data sets that the cache holds."""
_SHORT = {"token_ids": torch.int32, "authors": torch.int16, "roles": torch.int16, "ends": torch.int64}


class Examples(Sequence[Example]):
    """Examples laid end to end in short integers; each is made when asked for."""

    def __init__(self, tensors: dict[str, torch.Tensor], sources: Sequence[str], digest: str) -> None:
        self._tensors, self._sources = tensors, sources
        ends = tensors["ends"].tolist()
        self._spans = list(zip([0, *ends], ends, strict=False))
        self.digest = digest
        """Of all tokens, authors and roles."""

    @classmethod
    def of(cls, examples: Sequence[Example]) -> Examples:
        """Lay `examples` out."""
        parts = {name: [getattr(example, name) for example in examples] for name in ("token_ids", "authors", "roles")}
        tensors = {name: torch.cat(some).to(_SHORT[name]) for name, some in parts.items()}
        tensors["ends"] = torch.tensor([len(example) for example in examples]).cumsum(0)
        return cls(tensors, [example.source for example in examples], _digest(tensors))

    @property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        return [end - start for start, end in self._spans]

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]  # slices are of no use here
        start, end = self._spans[index]
        ids, authors, roles = (self._tensors[name][start:end].long() for name in ("token_ids", "authors", "roles"))
        return Example(self._sources[index], ids, authors, roles)

    def authored(self, roles: int) -> list[int]:
        """How many tokens each of so many roles learns."""
        return self._tensors["authors"].bincount(minlength=roles + 1)[1:].tolist()

    def write(self, path: Path, facts: dict[str, str]) -> None:
        """Write a file that `read` verifies; it appears whole or not at all."""
        metadata = {"digest": self.digest, "sources": json.dumps(list(self._sources)), **facts}
        write_file(path, safetensors.torch.save(self._tensors, metadata))

    @classmethod
    def read(cls, path: Path) -> tuple[Examples, dict[str, str]] | None:
        """What `write` wrote; None where the file is missing, torn or changed."""
        try:
            with safetensors.safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in _SHORT}
            sources = json.loads(metadata.pop("sources"))
            digest = metadata.pop("digest")
        except (OSError, ValueError, KeyError, safetensors.SafetensorError):
            return None
        if _digest(tensors) != digest or len(sources) != len(tensors["ends"]):
            return None
        return cls(tensors, sources, digest), metadata


def _digest(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in _SHORT:
        digest.update(tensors[name].contiguous().numpy().data)
    return digest.hexdigest()


def load_examples(
    spec: Path | str,
    renderer: Renderer,
    roles: Sequence[str],
    *,
    objective: Objective,
    prefix_writer: PrefixWriter | str,
    max_length: int | None = None,
) -> Examples:
    """The examples of what `spec` names (see `rows.locate`), keeping the first `max_length` tokens of each.

    Give them as they are to `shared` batches, and their `RoleViews` to `per_role` ones. Raises `UserError` naming file
    and line for an unreadable row, one in which no role authors anything that can be learnt, and a prompt/completion
    row unless the objective is `per_role`.
    """
    content, renders = content_digest(spec), renderer.digest()
    identity = [VERSION, str(spec), content, renders, list(roles), str(prefix_writer), max_length]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    place = cache_root() / "examples" / f"{key}.safetensors"
    with _locked(place):
        found = Examples.read(place)
        if found is None:
            found = examples, facts = _render(spec, renderer, roles, prefix_writer, max_length)
            with suppress(UserError, OSError):  # a full disk, or a folder that is not ours: this run goes on without
                examples.write(place, facts)
                _forget_the_oldest(place.parent)
                found = Examples.read(place) or found
    examples, facts = found
    if (row := facts.get("per_role_only")) and objective != "per_role":
        raise UserError(
            f"{row}: prompt/completion rows need `objective: per_role`, this is `{objective}`; "
            "give whole trajectories as `messages`."
        )
    return examples


@contextmanager
def _locked(place: Path) -> Iterator[None]:
    """One process renders while others wait. Where the cache cannot be written to, each does its own work."""
    lock = filelock.FileLock(place.with_suffix(".lock"))
    with suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    try:
        yield
    finally:
        if lock.is_locked:
            lock.release()


def _forget_the_oldest(folder: Path) -> None:
    """Keep the newest `KEPT` files of the cache: what a run has mapped stays readable for it."""
    files = sorted(folder.glob("*.safetensors"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in files[KEPT:]:
        path.unlink(missing_ok=True)


def _render(
    spec: Path | str,
    renderer: Renderer,
    roles: Sequence[str],
    prefix_writer: PrefixWriter | str,
    max_length: int | None,
) -> tuple[Examples, dict[str, str]]:
    rendered: list[Example] = []
    facts: dict[str, str] = {}
    for row, source in tqdm(read_rows(spec), desc=f"reading {spec}", unit=" rows", delay=3):
        trajectory = read_row(row, roles, source=source)
        if trajectory.per_role_only:
            facts.setdefault("per_role_only", source)
        rendered.append(example_of(trajectory, renderer, roles, prefix_writer, max_length))
    if not rendered:
        raise UserError(f"{spec}: holds no rows.")
    return Examples.of(rendered), facts
