"""Anything that may happen to requests, in any order, in every mode, on pools that are too small: no slot, sequence or
answer is lost, no stale entry is read, and in the end all memory is free again."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from scheduling import ROLES, WRITERS, Harness

from lragent.modes import SharingMode


class Storm(RuleBasedStateMachine):
    mode: SharingMode

    @initialize(
        slots=st.integers(24, 70),
        sequences=st.integers(1, 5),
        budget=st.integers(1, 24),
        growth=st.sampled_from([1, 5, 64]),
        per=st.sampled_from([1, 3, 8]),
        overlap=st.booleans(),
        gain=st.integers(1, 8),
    )
    def start(self, slots: int, sequences: int, budget: int, growth: int, per: int, overlap: bool, gain: int) -> None:
        self.harness = Harness(self.mode, slots, sequences, budget, growth, per, overlap)
        self.harness.scheduler.least_gain = gain
        self.harness.scheduler.check = True
        self.seen: list[list[int]] = [[]]

    @rule(
        data=st.data(),
        more=st.lists(st.integers(0, 1), min_size=1, max_size=10),
        answer=st.integers(1, 8),
        stop=st.none() | st.integers(1, 8),
        role=st.sampled_from(ROLES),
        salt=st.sampled_from(["", "", "tenant"]),
        times=st.integers(1, 3),
    )
    def arrive(self, data, more, answer, stop, role, salt, times) -> None:  # type: ignore[no-untyped-def]
        """Prompts that go on from what was said before, some of them together."""
        known = data.draw(st.sampled_from(self.seen))
        prompt = (known + more)[:16]
        tags = [role.reader.writer] * len(prompt)
        if self.mode.one_writer_per_token:
            tags = [data.draw(st.sampled_from(WRITERS)) for _ in prompt[1:]] + tags[:1]
        for at in range(times):
            self.harness.add([*prompt[:-1], prompt[-1] + at], answer, role, salt, tags=tags, stop=stop)
        self.seen.append(prompt)

    @rule(times=st.integers(1, 6))
    def step(self, times: int) -> None:
        for _ in range(times):
            self.harness.step()
        self.seen += [self.harness.device.tokens[sequence][:12] for sequence in self.harness.finished[-2:]]

    def everybody(self) -> list:  # type: ignore[type-arg]
        return [*self.harness.scheduler.running, *self.harness.scheduler.waiting]

    @precondition(lambda self: self.everybody())
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        everybody = self.everybody()
        self.harness.cancel(everybody[data.draw(st.integers(0, len(everybody) - 1))])
        self.harness.scheduler.check_integrity()

    @precondition(lambda self: self.harness.scheduler.running)
    @rule()
    def preempt(self) -> None:
        """As if slots had run out."""
        self.harness.scheduler._preempt(self.harness.scheduler.running[-1])
        self.harness.scheduler.check_integrity()

    @rule()
    def clear(self) -> None:
        self.harness.cache.clear()
        self.harness.scheduler.check_integrity()

    @rule(live=st.sets(st.sampled_from(WRITERS)))
    def reload(self, live: set[int]) -> None:
        """Roles come and go."""
        self.harness.cache.set_live_writers(sorted(live))

    def teardown(self) -> None:
        if not hasattr(self, "harness"):
            return
        requests = self.harness.count
        self.harness.run()
        assert len(self.harness.finished) + len(self.harness.cancelled) == requests


@pytest.mark.parametrize("mode", list(SharingMode))
def test_storm(mode: SharingMode) -> None:
    storm = type("Storm", (Storm,), {"mode": mode}).TestCase
    storm.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
    storm("runTest").runTest()
