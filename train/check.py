"""A whole data set looked through: every row that cannot be learnt from, and what the others hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lragent.chat import Renderer
from lragent.errors import UserError
from lragent.train.data import example_of
from lragent.train.rows import read_rows
from lragent.trajectories import read_row

UNEVEN = 20
"""A role that authors so many times less than another is pointed out."""


def uneven(authored: Mapping[str, int]) -> tuple[str, str, float] | None:
    """The role that authors least, the one that authors most, and how many times less; None where that is not much."""
    most, least = (pick(authored, key=lambda role: authored[role]) for pick in (max, min))
    times = authored[most] / max(1, authored[least])
    return (least, most, times) if authored[most] > UNEVEN * authored[least] else None


def balance(roles: Sequence[str], authored: Sequence[int]) -> str:
    """What each role has to learn from, in one line; a role with much less than another is pointed out."""
    whole = max(1, sum(authored))
    shares = [f"{role} {tokens:,} ({tokens / whole:.0%})" for role, tokens in zip(roles, authored, strict=True)]
    line = "authored tokens: " + ", ".join(shares)
    if found := uneven(dict(zip(roles, authored, strict=True))):
        line += f"; {found[0]} has {found[2]:.0f} times fewer than the most"
    return line


@dataclass
class Report:
    """What was found. Counts are of good rows, and tokens."""

    errors: list[str] = field(default_factory=list)
    rows: int = 0
    tokens: int = 0
    longest: int = 0
    cut: int = 0
    """Rows that `max_length` cuts off."""
    prompt_completion: int = 0
    """Rows that go with `objective: per_role` only."""
    authored: Counter[str] = field(default_factory=Counter)
    """Tokens that each role learns."""

    def warnings(self, roles: Sequence[str]) -> list[str]:
        """What may be meant, or not."""
        found = [f"the role {role!r} authors nothing" for role in roles if not self.authored[role]]
        said = {role: self.authored[role] for role in roles if self.authored[role]}
        if said and (of := uneven(said)):
            found.append(f"the role {of[0]!r} authors {of[2]:.0f} times fewer tokens than {of[1]!r}")
        if self.prompt_completion:
            found.append(f"{self.prompt_completion} prompt/completion rows need `objective: per_role`")
        return found


def check(spec: Path | str, renderer: Renderer, roles: Sequence[str], max_length: int | None) -> Report:
    """Look at every row of what `spec` names. Raises UserError only where rows cannot be read at all."""
    report = Report()
    for row, source in read_rows(spec, on_error=report.errors.append):
        try:
            trajectory = read_row(row, roles, source=source)
            whole = example_of(trajectory, renderer, roles, "base", None)
            example = whole if max_length is None else example_of(trajectory, renderer, roles, "base", max_length)
        except UserError as error:
            report.errors.append(str(error))
            continue
        report.rows += 1
        report.tokens += len(example)
        report.longest = max(report.longest, len(whole))
        report.cut += len(example) < len(whole)
        report.prompt_completion += trajectory.per_role_only
        for number, count in enumerate(example.authors.bincount(minlength=len(roles) + 1).tolist()[1:]):
            report.authored[roles[number]] += count
    return report
