"""The baselines compute what PEFT computes, run over no more than they must, and keep what the role itself wrote."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tiny import make_adapter_set, tiny_model

from lragent.bench.baselines import Baseline, CachePerRole, PeftTeam, PrefillAnew, Turn, replay
from lragent.peft_io import write_peft_folders

ROLES = ("plan", "action")
PROMPT = tuple(range(10, 30))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("adapters") / "peft"
    return dict(zip(ROLES, write_peft_folders(make_adapter_set(tiny_model(), ROLES), place), strict=True))


@pytest.fixture(scope="module")
def team(folders: dict[str, Path]) -> PeftTeam:
    return PeftTeam(tiny_model(), folders)


class Alone:
    """One role's adapter by itself, run over the whole context each time."""

    def __init__(self, folders: dict[str, Path]) -> None:
        self.models = {role: PeftModel.from_pretrained(tiny_model(), folder).eval() for role, folder in folders.items()}
        self.models["base"] = tiny_model()

    def greedy(self, role: str, context: Sequence[int], count: int) -> tuple[int, ...]:
        ids = list(context)
        for _ in range(count):
            with torch.no_grad():
                ids.append(int(self.models[role](input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        return tuple(ids[len(context) :])


@pytest.fixture(scope="module")
def alone(folders: dict[str, Path]) -> Alone:
    return Alone(folders)


def trajectory(alone: Alone) -> list[Turn]:
    """plan, action, plan, base, action: each answers three tokens, and four of a tool follow."""
    turns: list[Turn] = []
    context = PROMPT
    for number, role in enumerate(("plan", "action", "plan", "base", "action")):
        answer = alone.greedy(role, context, 3)
        turns.append(Turn(role, context, answer))
        context = (*context, *answer, *range(100 + 4 * number, 104 + 4 * number))
    return turns


def test_first_tokens_are_pefts_own(team: PeftTeam, alone: Alone) -> None:
    turns = trajectory(alone)
    expected = [turn.answer_ids[0] for turn in turns]
    for baseline in (PrefillAnew(team), CachePerRole(team)):
        assert [first.token for first in replay(baseline, turns)] == expected


def test_what_must_be_computed_is_counted(team: PeftTeam, alone: Alone) -> None:
    turns = trajectory(alone)
    assert [first.computed for first in replay(PrefillAnew(team), turns)] == [20, 27, 34, 41, 48]
    # The third turn is plan's second: it holds the prompt and two of its three tokens. The last is action's second.
    assert [first.computed for first in replay(CachePerRole(team), turns)] == [20, 27, 34 - 22, 41, 48 - 29]


def test_the_roles_really_differ(alone: Alone) -> None:
    assert len({alone.greedy(role, PROMPT, 6) for role in (*ROLES, "base")}) == 3


@pytest.mark.parametrize("kind", [PrefillAnew, CachePerRole])
def test_generate_gives_the_greedy_answer(kind: type[Baseline], team: PeftTeam, alone: Alone) -> None:
    baseline = kind(team)
    baseline.begin()
    for turn in trajectory(alone):
        made = baseline.generate(turn, 3, [])
        assert made.token_ids == turn.answer_ids
        assert 0 < made.ttft_s <= made.total_s
    stop = trajectory(alone)[0].answer_ids[1]
    assert baseline.generate(Turn("plan", PROMPT, ()), 3, [stop]).token_ids == trajectory(alone)[0].answer_ids[:2]


def test_a_context_that_goes_another_way_is_cropped(team: PeftTeam, alone: Alone) -> None:
    baseline = CachePerRole(team)
    baseline.begin()
    baseline.first_token(Turn("plan", PROMPT, ()))
    other = (*PROMPT[:12], 7, 8, 9)
    first = baseline.first_token(Turn("plan", other, ()))
    assert (first.computed, first.token) == (3, alone.greedy("plan", other, 1)[0])
    # The very same prompt again: its last token must be computed for its logits.
    again = baseline.first_token(Turn("plan", other, ()))
    assert (again.computed, again.token) == (1, first.token)


def test_a_new_trajectory_begins_without_cache(team: PeftTeam, alone: Alone) -> None:
    baseline = CachePerRole(team)
    turns = trajectory(alone)
    first, second = replay(baseline, turns), replay(baseline, turns)
    assert [f.computed for f in first] == [f.computed for f in second]
