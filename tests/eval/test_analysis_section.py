"""Records of caches and next tokens as tables and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lragent.eval.analysis.section import section

MODES = ("full_shared", "base_shared", "base_lr_shared")


def alike(label: str, layer: int, pair: tuple[str, str], cosine: float, what: str = "key") -> dict[str, Any]:
    named = {"kind": "similarity", "label": label, "layer": layer, "what": what, "pair": list(pair)}
    return named | {"cosine": cosine, "tokens": 100}


def moved(label: str, mode: str, kl: float, role: str = "all", step: int | None = None, n: int = 10) -> dict[str, Any]:
    named = {"kind": "divergence", "label": label, "mode": mode, "role": role, "step": step}
    figures = {"kl": kl, "interval": [kl / 2, 2 * kl], "median": kl / 10, "p99": 9 * kl, "changed": 0.25}
    return named | figures | {"targets": 4 * n, "trajectories": n}


def records(label: str, scale: float = 1.0) -> list[dict[str, Any]]:
    found = []
    for layer in (0, 1):
        found += [
            alike(label, layer, ("plan", "action"), 0.9 - 0.2 * layer),
            alike(label, layer, ("base", "plan"), 0.1),
            alike(label, layer, ("plan", "shared"), 0.5),
            alike(label, layer, ("base", "shared"), 0.1),
        ]
    for at, mode in enumerate(MODES, start=1):
        found.append(moved(label, mode, scale * at))
        found += [moved(label, mode, scale * at, role) for role in ("plan", "action")]
        found += [moved(label, mode, scale * at, step=step, n=10 if step < 3 else 0) for step in range(4)]
    return found


def rows(text: str, first: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith(f"| {first} ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_every_label_has_its_rows_and_pictures_are_linked(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    text = section([*records("per_role"), *records("mixed", 0.5), {"kind": "other"}], folder)
    among, own, full, base, base_lr, *by_role = rows(text, "per_role")
    assert among == ["per_role", "0.800 (0.700)"], "of roles only: not of base, not of what is shared"
    assert own == ["per_role", "0.500 (0.500)"]
    assert full == ["per_role", "`full_shared`", "1 (0.5 to 2)", "0.1", "9", "25.00"]
    assert [base[1], base_lr[1]] == ["`base_shared`", "`base_lr_shared`"]
    assert by_role[2] == ["per_role", "`base_lr_shared`", "3 (1.5 to 6)", "3 (1.5 to 6)"]
    assert len(rows(text, "mixed")) == 8
    linked = {part.split(")")[0] for part in text.split("](")[1:]}
    assert linked == {f"pictures/{path.name}" for path in folder.iterdir()}
    assert len(linked) == 3


def test_several_runs_of_a_label_are_averaged(tmp_path: Path) -> None:
    text = section([*records("mixed", 1.0), *records("mixed", 3.0)], tmp_path)
    assert rows(text, "mixed")[2][2] == "2 (1 to 3)"


def test_the_same_records_make_the_same_bytes(tmp_path: Path) -> None:
    made = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        section(records("mixed"), tmp_path / name)
        made.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert made[0] == made[1]


def test_one_trajectory_has_no_interval_and_one_kind_is_enough(tmp_path: Path) -> None:
    alone = [record | {"interval": None} for record in records("mixed") if record["kind"] == "divergence"]
    text = section(alone, tmp_path)
    assert rows(text, "mixed")[0][2] == "1"
    assert "How alike" not in text
    assert section([], tmp_path) == ""


def test_a_team_of_one_has_no_pairs(tmp_path: Path) -> None:
    text = section([record for record in records("solo") if record.get("pair") != ["plan", "action"]], tmp_path)
    assert rows(text, "solo")[:2] == [["solo", "-"], ["solo", "0.500 (0.500)"]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["divergence.png", "similarity-shared.png"]
