"""Which batches a step learns from."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lragent.train.data import Example
from lragent.train.tasks import Tasks


def example(authors: list[int], source: str) -> Example:
    ids = torch.arange(len(authors))
    return Example(source, ids, torch.tensor(authors), torch.zeros(len(authors), dtype=torch.long))


def tasks(objective: str, count: int = 6, *, budget: int = 12, per_step: int = 1, seed: int = 1) -> Tasks:
    examples = [example([0, 0, 1, 2, 3, 1], str(at)) for at in range(count)]
    return Tasks(objective, examples, tokens_per_batch=budget, batches_per_step=per_step, seed=seed)  # type: ignore[arg-type]


def test_mixed_takes_batches_in_turn_and_one_epoch_is_every_trajectory_once() -> None:
    mixed = tasks("mixed")
    assert mixed.steps(2) == 2 * 2 * 3
    some = [task for step in range(6) for task in mixed.of_step(step)]
    assert [task.one_pass for task in some] == [True, False] * 3
    assert [task.number for task in some] == list(range(6))
    assert sorted(source for task in some if task.one_pass for source in task.batch.sources) == list("012345")
    assert all(task.targets == int((task.batch.loss_roles > 0).sum()) for task in some)
    assert tasks("shared").steps(1) == 3
    assert tasks("per_role").steps(1) >= 9
    held_out = mixed.one_epoch()
    assert sum(task.one_pass for task in held_out) == 3
    assert sum(task.targets for task in held_out if task.one_pass) == 24
    assert sum(task.targets for task in held_out if not task.one_pass) == 24


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(["shared", "per_role", "mixed"]),
    st.integers(1, 9),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(0, 12),
)
def test_processes_share_out_what_one_would_take(objective: str, count: int, each: int, world: int, step: int) -> None:
    plan = tasks(objective, count, per_step=each * world)
    alone = plan.of_step(step)
    shares = [plan.of_step(step, rank=rank, world=world) for rank in range(world)]
    assert {len(share) for share in shares} == {each}
    dealt = [task for turn in zip(*shares, strict=True) for task in turn]
    assert [(task.number, task.batch.sources) for task in dealt] == [(t.number, t.batch.sources) for t in alone]
    if objective == "mixed" and each % 2 == 0:
        assert all(len({task.one_pass for task in turn}) == 1 for turn in zip(*shares, strict=True))


def test_any_step_is_had_without_those_before_it() -> None:
    walked = tasks("mixed", per_step=2)
    for step in range(9):
        walked.of_step(step)
    once, again = tasks("mixed", per_step=2).of_step(8), walked.of_step(8)
    assert [task.batch.sources for task in once] == [task.batch.sources for task in again]
    back = walked.of_step(0)
    assert [task.batch.sources for task in back] == [
        task.batch.sources for task in tasks("mixed", per_step=2).of_step(0)
    ]


@pytest.mark.parametrize("objective", ["shared", "per_role", "mixed"])
def test_the_seed_fixes_the_order(objective: str) -> None:
    def order(seed: int) -> list[tuple[str, ...]]:
        plan = tasks(objective, 8, seed=seed)
        return [task.batch.sources for step in range(8) for task in plan.of_step(step)]

    assert order(3) == order(3)
    assert order(3) != order(4)
