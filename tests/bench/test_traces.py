"""Traces for teams of any size, and what each step of them computes."""

from __future__ import annotations

import pytest

from lragent.bench.traces import Planned, Work, paper_trace, team, team_trace, trace_slots, trace_tokens, trace_work
from lragent.errors import UserError
from lragent.modes import SharingMode

TRACE = [Planned("plan", 20, 4), Planned("action", 3, 4), Planned("plan", 3, 2)]


def test_teams() -> None:
    assert team(2) == ("plan", "action")
    assert team(5) == ("plan", "action", "reflect", "role4", "role5")
    with pytest.raises(UserError, match="--roles"):
        team(0)


def test_three_roles_play_the_papers_trace() -> None:
    assert team_trace(256, team(3)) == paper_trace(256)


def test_more_roles_take_the_steps_in_turn() -> None:
    trace = team_trace(256, team(8))
    assert [step.role for step in trace[:9]] == [*team(8), "plan"]
    assert trace_tokens(trace) == 1936


def test_what_each_mode_computes() -> None:
    shared = [Work("plan", 20, 20, 0, 4), Work("action", 27, 4, 0, 4), Work("plan", 34, 4, 0, 2)]
    assert trace_work(TRACE, SharingMode.BASE_LR_SHARED) == trace_work(TRACE, SharingMode.FULL_SHARED) == shared
    alone = [Work("plan", 20, 20, 0, 4), Work("action", 27, 27, 0, 4), Work("plan", 34, 11, 0, 2)]
    assert trace_work(TRACE, SharingMode.NON_SHARED) == alone
    base = [Work("plan", 20, 20, 0, 4), Work("action", 27, 4, 23, 4), Work("plan", 34, 4, 7, 2)]
    assert trace_work(TRACE, SharingMode.BASE_SHARED) == base


def test_slots() -> None:
    assert trace_slots(TRACE, SharingMode.FULL_SHARED) == 36
    assert trace_slots(TRACE, SharingMode.NON_SHARED) == 31 + 36
