"""A very short soak, and what it must find."""

from __future__ import annotations

from pathlib import Path

import pytest

from lragent.bench.soak import faults, run


@pytest.mark.slow
def test_a_short_soak_finds_nothing(tmp_path: Path) -> None:
    numbers = run(minutes=0.15, users=6, folder=tmp_path)
    assert faults(numbers) == []
    assert numbers["requests"] > 20
    assert set(numbers["ended"]) <= {"stop", "length", "cancelled"}
    assert sum(numbers["ended"].values()) == numbers["ledger"]["requests"]


def test_what_must_not_be_is_named() -> None:
    numbers = {
        "minutes": 30.0,
        "failures": [{"name": "chat", "error": "500", "times": 3}],
        "memory": {"growth": 0.5},
        "files": {"before": 10, "after": 100},
        "slots_held_at_the_end": 4,
        "exit_status": 1,
        "server_log": "Traceback",
    }
    assert [line.split()[0] for line in faults(numbers)] == ["chat:", "memory", "files", "4", "the", "the"]
