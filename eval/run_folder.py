"""The folder of `lragent eval run`: a file of answers for each mode, and `run.json` that says whose they are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lragent.atomic import write_file
from lragent.errors import UserError
from lragent.eval.agent import Message
from lragent.eval.answers import read_answers, settled
from lragent.eval.machines import machines_of, note_machine
from lragent.eval.records import Record
from lragent.eval.study.merge import cell_of

RUN = "run.json"
IDENTITY = {"world": "to another world", "team": "of another team", "iterations": "with other --iterations"}
"""Facts that a run which has begun keeps. How many questions are asked at once may change: it moves times only."""


class RunFolder:
    """Where one team's answers to one world lie."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def answers(self, mode: str) -> Path:
        """What the team answered in a mode."""
        return self.path / f"{mode}.jsonl"

    def keep(self, mode: str, messages: Sequence[Message]) -> None:
        """Adds a trajectory to `trajectories/MODE.jsonl`, a row as training and `lragent eval caches` read them."""
        path = self.path / "trajectories" / f"{mode}.jsonl"
        path.parent.mkdir(exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")

    def begin(self, world: Path, level: str, team: Path | str, iterations: int) -> None:
        """Makes the folder, or goes on with it. Raises UserError where it holds something else.

        team: a pack that is there, or the URL of an endpoint.
        """
        own = hashlib.sha256(team.read_bytes()).hexdigest() if isinstance(team, Path) else team
        facts = {"world": hashlib.sha256(world.read_bytes()).hexdigest(), "team": own, "iterations": iterations}
        begun = self.facts() if (self.path / RUN).is_file() else None
        if begun is None and self.path.is_dir() and any(self.path.iterdir()):
            raise UserError(f"--output: {self.path} holds other files; name a new folder.")
        for name, what in IDENTITY.items():
            if begun is not None and begun.get(name) != facts[name]:
                raise UserError(f"--output: {self.path} holds answers {what}; name another folder.")
        self.path.mkdir(parents=True, exist_ok=True)
        if begun is None:
            self._write({**facts, "level": level, "workers": {}})

    def note(self, mode: str, workers: int, *, here: bool) -> None:
        """Writes down what times depend on, before a mode is asked: how many questions at once, and if the engine is
        `here`, the machine."""
        facts = self.facts()
        known: dict[str, list[int]] = facts.get("workers", {})
        self._write(facts | {"workers": known | {mode: sorted({*known.get(mode, ()), workers})}})
        if here:
            note_machine(self.path)

    def facts(self) -> dict[str, Any]:
        """What run.json says. Raises UserError where it cannot be read."""
        path = self.path / RUN
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{path}: is no file of `lragent eval run` ({error}).") from error

    def _write(self, facts: dict[str, Any]) -> None:
        write_file(self.path / RUN, json.dumps(facts).encode())


def speeds_of(paths: Sequence[Path], tell: Callable[[str], None]) -> list[Record]:
    """Records of kind `speed`, one for each mode that was asked, under the name of its folder; `tell` is given what is
    not counted. Raises UserError."""
    records: list[Record] = []
    for path in paths:
        if any(record["label"] == path.resolve().name for record in records):
            raise UserError(f"{path}: another folder has this name, by which a report tells runs apart; rename one.")
        folder = RunFolder(path)
        facts = folder.facts()
        for file in sorted(path.glob("*.jsonl")):
            if counted := settled(read_answers(file), str(file), tell):
                records.append(
                    {
                        "kind": "speed",
                        "label": path.resolve().name,
                        "level": facts.get("level"),
                        "mode": file.stem,
                        "workers": facts.get("workers", {}).get(file.stem, []),
                        "machines": sorted({machine["machine"] for machine in machines_of(path)}),
                        **cell_of(counted),
                    }
                )
    return records
