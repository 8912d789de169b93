"""Which tokens a sampler may draw, and that a seed says which."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lragent.errors import UserError
from lragent.serve.engine.sampler import Sampler, filtered_probabilities
from lragent.serve.engine.types import SamplingParams

LOGITS = st.lists(st.integers(-40, 40), min_size=1, max_size=20, unique=True).map(lambda n: torch.tensor(n) / 5)
QUICK = settings(max_examples=100, deadline=None)


def kept(logits: torch.Tensor, **params: float) -> set[int]:
    probabilities = filtered_probabilities(logits, SamplingParams(**params))
    torch.testing.assert_close(probabilities.sum(), torch.tensor(1.0))
    assert int(logits.argmax()) == int(probabilities.argmax()), "the best token is not the likeliest"
    return set(probabilities.nonzero().flatten().tolist())


@QUICK
@given(LOGITS, st.integers(1, 25))
def test_top_k_keeps_the_k_best(logits: torch.Tensor, k: int) -> None:
    assert kept(logits, top_k=k) == set(logits.argsort(descending=True)[:k].tolist())


@QUICK
@given(LOGITS, st.floats(0.01, 1.0))
def test_top_p_keeps_the_fewest_that_reach_p(logits: torch.Tensor, p: float) -> None:
    probabilities = torch.softmax(logits.double(), 0)
    inside = kept(logits, top_p=p)
    mass = float(probabilities[list(inside)].sum())
    assert mass >= p - 1e-5
    least = min(float(probabilities[i]) for i in inside)
    assert len(inside) == 1 or mass - least < p + 1e-5, "one token too many"
    assert all(float(probabilities[i]) <= least for i in range(len(logits)) if i not in inside)


@QUICK
@given(LOGITS, st.floats(0.01, 0.99))
def test_min_p_keeps_what_is_likely_beside_the_best(logits: torch.Tensor, p: float) -> None:
    share = torch.exp(logits.double() - logits.double().max())
    inside = kept(logits, min_p=p)
    assert all(share[i] >= p - 1e-5 for i in inside)
    assert all(share[i] < p + 1e-5 for i in range(len(logits)) if i not in inside)


@QUICK
@given(LOGITS, st.floats(0.1, 2.0))
def test_temperature_divides_the_logits(logits: torch.Tensor, temperature: float) -> None:
    got = filtered_probabilities(logits, SamplingParams(temperature=temperature))
    torch.testing.assert_close(got, torch.softmax(logits.double() / temperature, 0).float())


def test_temperature_zero_is_greedy() -> None:
    sampler = Sampler(SamplingParams(temperature=0.0, top_p=0.3, seed=1), 0)
    logits = torch.randn(50)
    assert {sampler.next_token(logits) for _ in range(20)} == {int(logits.argmax())}


def test_frequencies_follow_the_probabilities() -> None:
    logits = torch.tensor([0.1, 0.2, 0.7, 1e-9]).log()
    sampler = Sampler(SamplingParams(), 7)
    counts = torch.zeros(4)
    for _ in range(4000):
        counts[sampler.next_token(logits)] += 1
    torch.testing.assert_close(counts / 4000, torch.tensor([0.1, 0.2, 0.7, 0.0]), atol=0.03, rtol=0)


def draws(params: SamplingParams, fallback: int = 0) -> list[int]:
    sampler = Sampler(params, fallback)
    return [sampler.next_token(torch.zeros(1000)) for _ in range(8)]


def test_a_seed_says_what_is_drawn() -> None:
    assert draws(SamplingParams(seed=5)) == draws(SamplingParams(seed=5), fallback=9)
    assert draws(SamplingParams(seed=5)) != draws(SamplingParams(seed=6))
    assert draws(SamplingParams(seed=-3)) != draws(SamplingParams(seed=3))
    assert draws(SamplingParams(seed=0), fallback=4) == draws(SamplingParams(seed=0))
    assert draws(SamplingParams(), fallback=1) != draws(SamplingParams(), fallback=2)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("temperature", 2.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_k", -1),
        ("min_p", 1.0),
        ("seed", 2**63),
        ("stop", ("",)),
        ("stop", ("x",) * 17),
    ],
)
def test_what_is_out_of_range_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(UserError, match=f"^{field}: "):
        SamplingParams(**{field: value})
