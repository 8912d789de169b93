"""Sampling through the engine: answers do not depend on company, and what is told of tokens is the model's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engines import Recorder, tiny_engine

from lragent.errors import UserError

FEW = tuple((token, 20.0) for token in range(40, 50))
"""Leaves ten tokens, so that they come again and penalties matter."""
ASKED: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 1.0, "seed": 1},
    {"temperature": 0.7, "seed": 2, "top_p": 0.8, "repetition_penalty": 1.3, "logit_bias": FEW},
    {"presence_penalty": 1.5, "frequency_penalty": 0.5, "logit_bias": FEW},
    {"temperature": 0.5, "seed": 4, "top_k": 20, "frequency_penalty": 2.0, "logit_bias": FEW},
    {"temperature": 1.3, "seed": 5, "min_p": 0.05, "presence_penalty": 2.0, "logit_bias": FEW, "logprobs": 2},
)
"""Those that come last are preempted: their penalties must resume with what was said."""


def prompt_of(number: int) -> list[int]:
    return torch.randint(3, 280, (12 + number,), generator=torch.Generator().manual_seed(number)).tolist()


def test_answers_are_the_same_side_by_side_with_preemption_as_one_by_one() -> None:
    alone = []
    for number, params in enumerate(ASKED):
        recorder = Recorder(tiny_engine("non_shared"))
        alone.append(recorder.ask("plan", prompt_of(number), 20, **params).token_ids)
    crowd = Recorder(tiny_engine("non_shared", cache_tokens=100, max_model_len=90, token_budget=16, max_num_seqs=4))
    names = [crowd.submit("plan", prompt_of(number), 20, **params) for number, params in enumerate(ASKED)]
    crowd.finish()
    assert crowd.engine.stats().preempted > 0
    assert [crowd.answer(name).token_ids for name in names] == alone


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_each_token_has_its_logprob_the_last_one_too(temperature: float) -> None:
    """The end of the turn is a token like the others: likely enough here that the answer ends with it."""
    recorder = Recorder(tiny_engine("non_shared"))
    options: dict[str, Any] = {"logprobs": 3, "logit_bias": ((2, 4.0),), "ignore_eos": False}
    answer = recorder.ask("plan", prompt_of(0), 200, temperature=temperature, seed=4, **options)
    assert answer.token_ids[-1] == 2
    log = recorder.last_logits().log_softmax(-1)
    assert [each.token_id for each in answer.logprobs] == list(answer.token_ids)
    for each, row in zip(answer.logprobs, log, strict=True):
        assert each.logprob == pytest.approx(float(row[each.token_id]), abs=1e-5)
        assert [token for token, _ in each.top] == row.topk(3).indices.tolist()
    assert recorder.ask("plan", prompt_of(0), 5).logprobs == ()


def test_a_bias_beyond_the_vocabulary_is_refused_by_name() -> None:
    recorder = Recorder(tiny_engine("non_shared"))
    with pytest.raises(UserError, match=r"^logit_bias: "):
        recorder.submit("plan", [5], logit_bias=((300, 1.0),))
