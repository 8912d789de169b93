"""Requests that come together with the same new prefix: one computes it, the others wait for it and reuse it."""

from __future__ import annotations

import pytest
from scheduling import ROLES, WRITERS, Harness

from lragent.modes import SharingMode

each_mode = pytest.mark.parametrize("mode", list(SharingMode))
PREFIX = list(range(100, 140))


@each_mode
@pytest.mark.parametrize("overlap", [False, True])
def test_one_role_computes_a_common_prefix_once(mode: SharingMode, overlap: bool) -> None:
    harness = Harness(mode, slots=600, overlap=overlap, max_sequences=8)
    asked = [harness.add([*PREFIX, n, n + 1], answer=1) for n in range(4)]
    harness.run_until_idle()
    counters = harness.cache.counters
    assert counters.base_allocated == len(PREFIX) + 4 * 2
    if mode is SharingMode.BASE_SHARED:
        assert counters.lr_allocated == counters.base_allocated
    assert harness.scheduler.held_back == 3
    assert [s.usage().base_reused for s in asked] == [0, 40, 40, 40]
    assert [s.usage().tokens_computed for s in asked] == [42, 2, 2, 2]
    harness.check_end()


@each_mode
def test_other_roles_wait_only_for_what_they_may_read(mode: SharingMode) -> None:
    harness = Harness(mode, slots=600, max_sequences=8)
    for role in ROLES:
        harness.add([*PREFIX, 1, 2], answer=1, role=role)
    harness.run_until_idle()
    shared = mode is not SharingMode.NON_SHARED
    assert harness.scheduler.held_back == (2 if shared else 0)
    expected = 41 + 3 if shared else 3 * 42  # the opening token hits entries of the role alone
    assert harness.cache.counters.base_allocated == expected
    if mode is SharingMode.BASE_SHARED:
        assert harness.cache.counters.lr_allocated == 3 * 42
    harness.check_end()


def test_one_role_waits_for_an_lr_prefill_under_way() -> None:
    harness = Harness(SharingMode.BASE_SHARED, slots=600)
    harness.add([*PREFIX, 1], answer=1)
    harness.run_until_idle()
    for n in range(3):
        harness.add([*PREFIX, 2, n], answer=1, role=ROLES[1])
    low = harness.cache.counters.lr_allocated
    harness.run_until_idle()
    assert harness.scheduler.held_back == 2
    assert harness.cache.counters.lr_allocated - low == 40 + 1 + 3
    harness.check_end()


@each_mode
def test_tenants_do_not_wait_for_each_other(mode: SharingMode) -> None:
    harness = Harness(mode, slots=600)
    harness.add(PREFIX, salt="one")
    harness.add(PREFIX, salt="two")
    harness.step()
    assert harness.scheduler.held_back == 0
    assert len(harness.scheduler.running) == 2
    harness.run()


def test_writers_that_are_not_loaded_are_not_waited_for() -> None:
    harness = Harness(SharingMode.BASE_LR_SHARED, slots=600)
    harness.cache.set_live_writers(WRITERS[1:])
    harness.add(PREFIX)
    harness.add(PREFIX, role=ROLES[1])
    harness.step()
    assert harness.scheduler.held_back == 0
    harness.run()


def test_a_few_tokens_are_not_waited_for() -> None:
    harness = Harness(slots=600)
    harness.add(PREFIX)
    harness.add([*PREFIX[:7], *range(30)])
    harness.step()
    assert harness.scheduler.held_back == 0
    harness.run()


def test_others_pass_and_nobody_looks_after_who_is_held_back(monkeypatch: pytest.MonkeyPatch) -> None:
    harness = Harness(slots=600, token_budget=4, max_sequences=4)
    first, held = harness.add(PREFIX), harness.add([*PREFIX, 1, 2])
    harness.step()
    other = harness.add([1, 2, 3], answer=2)
    harness.step()
    assert harness.scheduler.waiting == [held]
    assert other in harness.scheduler.running
    opened = []
    open_lease = harness.cache.open
    monkeypatch.setattr(harness.cache, "open", lambda *a, **k: opened.append(a) or open_lease(*a, **k))
    while first.computed < len(PREFIX):
        harness.step()
        assert opened == []
    harness.step()
    assert len(opened) == 1
    assert held.computed > len(PREFIX)
    harness.run()


@each_mode
def test_a_chunk_is_enough_for_who_needs_no_more(mode: SharingMode) -> None:
    """A short prompt that begins a long one waits for that much of it, not for its end."""
    harness = Harness(mode, slots=600, token_budget=8)
    long = harness.add(PREFIX)
    short = harness.add([*PREFIX[:16], 1])
    harness.step()
    harness.step()
    assert short.lease is None
    harness.step()
    assert short.lease is not None
    assert short.usage().base_reused == 16
    assert long.computed < len(PREFIX)
    harness.run()


@pytest.mark.parametrize("leaves", ["cancelled", "preempted"])
def test_if_who_computes_it_leaves_the_next_goes_on(leaves: str) -> None:
    harness = Harness(slots=600, token_budget=8)
    first, second, third = (harness.add([*PREFIX, n]) for n in range(3))
    harness.step()
    harness.step()
    if leaves == "cancelled":
        harness.cancel(first)
    else:
        harness.scheduler._preempt(first)
    harness.step()
    assert harness.scheduler.running[0] is (second if leaves == "cancelled" else first)
    assert harness.scheduler.running[0].computed == 24, "what was computed is lost"
    assert harness.scheduler.held_back == (3 if leaves == "cancelled" else 4)
    harness.run()
    assert third in harness.finished


def test_who_is_held_back_can_be_cancelled() -> None:
    harness = Harness(slots=600, token_budget=8)
    _, second, third = (harness.add([*PREFIX, n]) for n in range(3))
    harness.step()
    harness.cancel(second)
    harness.cancel(third)
    assert harness.scheduler.waiting == []
    harness.run()
    assert len(harness.finished) == 1
