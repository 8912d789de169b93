"""A whole data set looked through: every row that cannot be learnt from, and what the others hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lragent.chat import Renderer
from lragent.errors import UserError
from lragent.train.data import example_of
from lragent.train.rows import read_rows
from lragent.trajectories import read_row

UNEVEN = 20
"""A role that authors so many times less than another is pointed out."""


def balance(roles: Sequence[str], authored: Sequence[int]) -> str:
    """What each role has to learn from, in one line; a role with much less than another is pointed out."""
    whole = max(1, sum(authored))
    shares = [f"{role} {tokens:,} ({tokens / whole:.0%})" for role, tokens in zip(roles, authored, strict=True)]
    line = "authored tokens: " + ", ".join(shares)
    most, least = max(authored), min(authored)
    if most > UNEVEN * least:
        line += f"; {roles[authored.index(least)]} has {most / max(1, least):.0f} times fewer than the most"
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
        said = [role for role in roles if self.authored[role]]
        if said:
            most, least = (pick(said, key=lambda role: self.authored[role]) for pick in (max, min))
            if self.authored[most] > UNEVEN * self.authored[least]:
                times = self.authored[most] / self.authored[least]
                found.append(f"the role {least!r} authors {times:.0f} times fewer tokens than {most!r}")
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
