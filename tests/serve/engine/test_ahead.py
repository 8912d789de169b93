"""Steps launched before the one before them is read: the same answers, and nothing kept of a step past a turn's end."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from engines import ROLES, Recorder, tiny_engine

from lragent.modes import SharingMode
from lragent.serve.engine.types import Chunk, FinishReason, GenerationRequest, Prompt, SamplingParams

END = 2
"""The token that ends a turn."""
each_mode = pytest.mark.parametrize("mode", list(SharingMode))
each_device = pytest.mark.parametrize(
    "options", [{}, pytest.param({"device": "cuda", "graphs": True}, marks=pytest.mark.gpu)], ids=["cpu", "cuda"]
)


def prompt(number: int, length: int) -> list[int]:
    return torch.randint(3, 280, (length,), generator=torch.Generator().manual_seed(number)).tolist()


def answers(mode: SharingMode, ahead: bool, **options: Any) -> dict[str, tuple[int, ...]]:
    """Of a storm of requests with slots for few of them, some cancelled: what those that ended got."""
    recorder = Recorder(tiny_engine(mode, ahead=ahead, cache_tokens=160, max_num_seqs=4, token_budget=24, **options))
    source = random.Random(5)
    names = []
    for number in range(14):
        shared = prompt(number % 3, 20)
        wish = {"repetition_penalty": 1.3, "logprobs": 2} if number % 4 == 1 else {}
        wish |= {"temperature": 1.0, "seed": number} if number % 4 == 2 else {}
        ids = [*shared, *prompt(100 + number, source.randrange(1, 12))]
        names.append(recorder.submit(ROLES[number % 3], ids, source.randrange(1, 30), salt=str(number), **wish))
        for _ in range(source.randrange(3)):
            recorder.engine.step()
            recorder.engine.cache.check_integrity()
    recorder.engine.cancel(names[6])
    recorder.finish()
    assert recorder.engine._scheduler.preempted > 0
    assert recorder.engine.stats().running == recorder.engine.stats().waiting == 0
    assert recorder.chunks[names[6]][-1].finish_reason in (FinishReason.CANCELLED, FinishReason.LENGTH)
    recorder.engine.cache.clear()
    assert recorder.engine.cache.base_pool.free_count == recorder.engine.cache.base_pool.size
    return {name: recorder.answer(name).token_ids for name in names if name != names[6]}


@each_device
@each_mode
def test_answers_are_those_of_one_step_at_a_time(mode: SharingMode, options: dict[str, Any]) -> None:
    """Tenants of their own, so that no answer depends on who came first."""
    assert answers(mode, True, **options) == answers(mode, False, **options)


@each_device
@each_mode
def test_a_step_past_the_end_of_a_turn_leaves_nothing(mode: SharingMode, options: dict[str, Any]) -> None:
    recorder = Recorder(tiny_engine(mode, ahead=True, **options))
    ids = prompt(1, 12)
    recorder.forced["request-1"] = iter([50, 60, END])
    name = recorder.submit("plan", ids, 9, ignore_eos=False)
    recorder.finish()
    assert recorder.answer(name).token_ids == (50, 60, END)
    assert recorder.answer(name).finish_reason is FinishReason.STOP
    assert len(recorder.logits[name]) == 4, "a step was run past the end"
    again = recorder.ask("plan", [*ids, 50, 60, END, 7], 1)
    assert again.usage is not None
    assert again.usage.base_reused == len(ids) + 2


@each_device
def test_the_last_of_max_tokens_is_not_run_past(options: dict[str, Any]) -> None:
    recorder = Recorder(tiny_engine("base_lr_shared", ahead=True, max_model_len=20, **options))
    name = recorder.submit("plan", prompt(1, 12), 3)
    recorder.finish()
    assert len(recorder.logits[name]) == 3
    full = recorder.submit("plan", prompt(2, 12), 50)  # the context ends first
    recorder.finish()
    assert len(recorder.logits[full]) == len(recorder.answer(full).token_ids) == 9


def test_a_request_cancelled_while_its_step_runs_gets_no_token_of_it() -> None:
    recorder = Recorder(tiny_engine("base_lr_shared", ahead=True))
    name = recorder.submit("plan", prompt(1, 12), 9)
    other = recorder.submit("action", prompt(2, 12), 3)
    recorder.engine.step()
    recorder.engine.cancel(name)
    assert [chunk.finish_reason for chunk in recorder.chunks[name]] == [FinishReason.CANCELLED]
    recorder.finish()
    assert len(recorder.chunks[name]) == 1
    assert len(recorder.answer(other).token_ids) == 3


def test_a_request_may_come_again_under_its_name_while_the_step_of_the_first_runs() -> None:
    recorder = Recorder(tiny_engine("base_lr_shared", ahead=True))
    expected = recorder.ask("plan", prompt(2, 12), 3).token_ids
    recorder.submit("plan", prompt(1, 12), 9)
    recorder.engine.step()
    recorder.engine.cancel("request-2")
    recorder.count = 1
    assert recorder.ask("plan", prompt(2, 12), 3, salt="anew").token_ids == expected


def test_a_receiver_that_fails_loses_its_own_request_only() -> None:
    engine = tiny_engine("base_lr_shared", ahead=True)
    recorder = Recorder(engine)

    def fails(chunk: Chunk) -> None:
        raise RuntimeError("nobody there")

    engine.add(GenerationRequest("deaf", "plan", Prompt(prompt(1, 12)), SamplingParams(max_tokens=9)), fails)
    other = recorder.submit("action", prompt(2, 12), 3)
    recorder.finish()
    assert len(recorder.answer(other).token_ids) == 3
    engine.add(GenerationRequest("deaf", "plan", Prompt(prompt(1, 12)), SamplingParams(max_tokens=9)), fails)
    another = recorder.submit("action", prompt(2, 12), 3)
    engine.fail_all("a fault")
    assert recorder.chunks[another][-1].finish_reason is FinishReason.ERROR
