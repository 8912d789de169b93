"""From files of trajectories to examples: token ids, who authored each, and which role processes each position."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lragent.adapter_set import Objective
from lragent.chat import BASE, Renderer, position_roles
from lragent.errors import UserError
from lragent.modes import PrefixWriter
from lragent.trajectories import TextCompletion, Trajectory, parse_row, read_row

NO_TARGET = -100
"""The label of positions whose loss does not count, as torch's `cross_entropy` ignores it."""


@dataclass(frozen=True, eq=False)
class Example:
    """One trajectory of L tokens. Roles are numbers: 0 is `base` (or nobody), `i + 1` the i-th trained role."""

    source: str
    """Where it came from: "file:line"."""
    token_ids: Tensor
    """[L] long"""
    authors: Tensor
    """[L] long: who authored the token and learns it; 0 where nobody does."""
    roles: Tensor
    """[L] long: who processes the position."""

    def __len__(self) -> int:
        return self.token_ids.numel()

    @property
    def targets(self) -> Tensor:
        """[L] long: the next token where a role authored it, else `NO_TARGET`."""
        return _next(self.token_ids, NO_TARGET).where(self.loss_roles > 0, NO_TARGET)

    @property
    def loss_roles(self) -> Tensor:
        """[L] long: who authored the target; 0 where there is none."""
        return _next(self.authors, 0)


def _next(values: Tensor, last: int) -> Tensor:
    return torch.cat([values[1:], values.new_tensor([last])])


def load_examples(
    path: Path | str,
    renderer: Renderer,
    roles: Sequence[str],
    *,
    objective: Objective,
    prefix_writer: PrefixWriter | str,
    max_length: int | None = None,
) -> list[Example]:
    """Read a JSONL or Parquet file and render every row, keeping the first `max_length` tokens.

    Give the examples themselves to `shared` batches, and their `role_views` to `per_role` ones. Raises `UserError`
    naming file and line for an unreadable row, one in which no role authors anything that can be learnt, and a
    prompt/completion row unless the objective is `per_role`.
    """
    examples = []
    for row, source in read_rows(Path(path)):
        trajectory = read_row(row, roles, source=source)
        if trajectory.per_role_only and objective != "per_role":
            raise UserError(
                f"{source}: prompt/completion rows need `objective: per_role`, this is `{objective}`; "
                "give whole trajectories as `messages`."
            )
        examples.append(_example(trajectory, renderer, roles, prefix_writer, max_length))
    if not examples:
        raise UserError(f"{path}: holds no rows.")
    return examples


def role_views(example: Example) -> list[Example]:
    """Return one example per role that authored something: the trajectory as that role alone runs and learns it.

    Every position is the role's, only its own tokens are learnt, and what follows its last one is cut off.
    """
    views = []
    for role in example.loss_roles.unique().tolist():
        if role == 0:
            continue
        end = int((example.authors == role).nonzero()[-1]) + 1
        authors = example.authors[:end]
        views.append(
            Example(
                source=example.source,
                token_ids=example.token_ids[:end],
                authors=authors.where(authors == role, 0),
                roles=torch.full((end,), role),
            )
        )
    return views


def _example(
    trajectory: Trajectory | TextCompletion,
    renderer: Renderer,
    roles: Sequence[str],
    prefix_writer: PrefixWriter | str,
    max_length: int | None,
) -> Example:
    rendered = trajectory.render(renderer)
    number = {None: 0, BASE: 0} | {name: at for at, name in enumerate(roles, start=1)}
    processed_by = position_roles(rendered, asker=None, prefix_writer=prefix_writer)
    learners = [number[author] for author in rendered.authors]
    for start, end in rendered.unlearnt:
        learners[start:end] = [0] * (end - start)
    example = Example(
        source=trajectory.source,
        token_ids=torch.tensor(rendered.token_ids[:max_length], dtype=torch.long),
        authors=torch.tensor(learners[:max_length], dtype=torch.long),
        roles=torch.tensor([number[role] for role in processed_by[:max_length]], dtype=torch.long),
    )
    if not example.loss_roles.any():
        if len(rendered.token_ids) > len(example) and any(rendered.authors):
            mend = f"within the first {max_length} of its {len(rendered.token_ids)} tokens; raise `max_length`"
        else:
            mend = "at all; give it an assistant message with the `name` of a role, or remove the row"
        raise UserError(f"{trajectory.source}: no role authors anything {mend}.")
    return example


def read_rows(path: Path) -> Iterator[tuple[Any, str]]:
    """Yield every row with its "file:line" (in Parquet: the row's number), both counted from 1."""
    if not path.is_file():
        raise UserError(f"{path}: is not a file; give a JSONL or Parquet file of trajectories.")
    import datasets  # slow to import

    parquet = path.suffix == ".parquet"
    try:
        # JSONL is read as lines of text: read as JSON, rows would have to share one set of columns and types,
        # and errors could not name the line. Streaming: what is kept are the examples, no copy in a cache folder.
        rows = datasets.load_dataset(
            "parquet" if parquet else "text", data_files={"train": [str(path)]}, split="train", streaming=True
        )
        for line, row in enumerate(rows, start=1):
            source = f"{path}:{line}"
            if parquet:
                yield row, source
            elif row["text"].strip():
                yield parse_row(row["text"], source=source), source
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:  # arrow's and Unicode's are ValueErrors
        kind = "a Parquet file" if parquet else "UTF-8 text"
        raise UserError(f"{path}: cannot be read as {kind} ({error}).") from error
