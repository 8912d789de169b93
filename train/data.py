"""From rows to examples: token ids, who authored each, and which role processes each position."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lragent.chat import BASE, Renderer, position_roles
from lragent.errors import UserError
from lragent.modes import PrefixWriter
from lragent.trajectories import TextCompletion, Trajectory

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


class RoleViews(Sequence[Example]):
    """Every trajectory once for each role that authored something in it, as that role alone runs and learns it.

    Every position is the role's, only its own tokens are learnt, and what follows its last one is cut off. Made when
    asked for.
    """

    def __init__(self, examples: Sequence[Example], roles: Collection[int] | None = None) -> None:
        """roles: whose views, None = all."""
        self._examples = examples
        self._views = [
            (at, role, int((example.authors == role).nonzero()[-1]) + 1)
            for at, example in enumerate(examples)
            for role in example.loss_roles.unique().tolist()
            if role and (roles is None or role in roles)
        ]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each view."""
        return [end for _, _, end in self._views]

    def __len__(self) -> int:
        return len(self._views)

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]  # slices are of no use here
        at, role, end = self._views[index]
        example = self._examples[at]
        authors = example.authors[:end]
        return Example(
            source=example.source,
            token_ids=example.token_ids[:end],
            authors=authors.where(authors == role, 0),
            roles=torch.full((end,), role),
        )


def lengths_of(examples: Sequence[Example]) -> list[int]:
    """Tokens of each example, without making it where that can be had."""
    known: list[int] | None = getattr(examples, "lengths", None)
    return [len(example) for example in examples] if known is None else known


def example_of(
    trajectory: Trajectory | TextCompletion,
    renderer: Renderer,
    roles: Sequence[str],
    prefix_writer: PrefixWriter | str,
    max_length: int | None,
) -> Example:
    """Render one row, keeping its first `max_length` tokens. Raises UserError where nothing in it can be learnt."""
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
