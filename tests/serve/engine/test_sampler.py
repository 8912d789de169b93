"""Which tokens a batch may draw, how often, and that a sequence's draws do not depend on anything beside it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from lragent.errors import UserError
from lragent.serve.engine.choose import Wish, choose
from lragent.serve.engine.sampler import BatchSampler, Drawn
from lragent.serve.engine.types import SamplingParams
from lragent.serve.engine.uniform import stream_of, uniform

QUICK = settings(max_examples=100, deadline=None)
GREEDY = SamplingParams(temperature=0.0)
on_each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def filtered_probabilities(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """[vocab] float32: one sequence's distribution, by the definitions of temperature, top_k, top_p and min_p."""
    scaled = logits.float() / max(params.temperature, 1e-5)
    if 0 < params.top_k < scaled.numel():
        floor = scaled.topk(params.top_k).values[-1]
        scaled = scaled.masked_fill(scaled < floor, float("-inf"))
    probabilities = torch.softmax(scaled, dim=-1)
    if params.top_p < 1.0:
        ordered, index = probabilities.sort(descending=True, stable=True)
        before = ordered.cumsum(0) - ordered  # mass of everything likelier
        ordered = ordered.masked_fill(before >= params.top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter_(0, index, ordered)
    if params.min_p > 0.0:
        probabilities = probabilities.masked_fill(probabilities < params.min_p * probabilities.max(), 0.0)
    return probabilities / probabilities.sum()


@contextmanager
def without_waiting(device: str) -> Iterator[None]:
    """Fails where the host waits for the device."""
    if device == "cpu":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@dataclass
class Batch:
    """A sampler and the sequences in its rows."""

    params: Sequence[SamplingParams]
    vocab: int
    device: str = "cpu"
    prompt: Sequence[int] = (0,)
    count: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.sampler = BatchSampler(len(self.params), self.vocab, torch.device(self.device))
        for row, params in enumerate(self.params):
            self.sampler.begin(row, params, params.seed or 0, self.prompt, ())

    def draw(self, logits: torch.Tensor, rows: list[int] | None = None, index: int | None = None) -> Drawn:
        """The next token of each of `rows`, or of all; logits: [n, vocab], or [vocab] for all alike."""
        rows = list(range(len(self.params))) if rows is None else rows
        logits = logits.expand(len(rows), -1).contiguous().to(self.device)
        before = logits.clone()
        index = self.count if index is None else index
        self.count = index + 1
        with without_waiting(self.device):
            drawn = self.sampler.draw(logits, rows, [index] * len(rows)).to_host()
        if self.device == "cuda":
            torch.cuda.synchronize()
        torch.testing.assert_close(logits, before, rtol=0, atol=0, equal_nan=True, msg="the logits were changed")
        assert drawn.tokens.dtype == torch.int64
        assert ((drawn.tokens >= 0) & (drawn.tokens < self.vocab)).all()
        return drawn


def drawn_many(logits: torch.Tensor, params: SamplingParams, count: int, device: str = "cpu") -> torch.Tensor:
    """`count` first tokens, of that many sequences with different seeds."""
    batch = Batch([replace(params, seed=seed) for seed in range(count)], logits.shape[-1], device)
    return batch.draw(logits).tokens


LOGITS = st.lists(st.integers(-40, 40), min_size=1, max_size=20).map(lambda n: torch.tensor(n) / 5)
PARAMS = st.builds(
    SamplingParams,
    temperature=st.just(1.0) | st.floats(0.1, 2.0),
    top_k=st.just(0) | st.integers(1, 25),
    top_p=st.just(1.0) | st.floats(0.01, 0.99),
    min_p=st.just(0.0) | st.floats(0.01, 0.99),
    seed=st.integers(0, 2**63 - 1),
)


@settings(max_examples=300, deadline=None)
@given(LOGITS, PARAMS)
def test_what_is_drawn_is_the_inverse_of_the_filtered_distribution(logits: torch.Tensor, params: SamplingParams):
    """The uniform number says where in the sum of probabilities: in the order of ids, or, sorted, of likelihood."""
    probabilities = filtered_probabilities(logits, params).double()
    plain = filtered_probabilities(logits, replace(params, top_p=1.0, min_p=0.0)).double()
    masses = plain.sort(descending=True).values.cumsum(0)
    assume(params.top_p == 1.0 or not ((masses - params.top_p).abs() < 1e-6).any())
    assume(not ((plain - params.min_p * plain.max()).abs() < 1e-6).any())
    order = torch.arange(len(logits))
    if params.top_k or params.top_p < 1.0:
        order = (logits / params.temperature).sort(descending=True, stable=True).indices
    sums = probabilities[order].cumsum(0)
    at = uniform(stream_of(params.seed or 0), 3)
    assume(not ((sums - at).abs() < 1e-6).any())
    expected = int(order[int((sums <= at).sum())])
    assert Batch([params], len(logits)).draw(logits, index=3).tokens.tolist() == [expected]


@QUICK
@given(LOGITS, PARAMS)
def test_only_what_the_filters_keep_is_drawn(logits: torch.Tensor, params: SamplingParams) -> None:
    kept = filtered_probabilities(logits, params) > 0
    assert kept[logits.argmax()], "the best token is always kept"
    assert kept[drawn_many(logits, params, 50)].all()


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Pearson's statistic over tokens that can be drawn, in standard deviations from its mean."""
    assert counts[probabilities == 0].sum() == 0
    expected = probabilities[probabilities > 0].double() * counts.sum()
    free = len(expected) - 1
    statistic = float((counts[probabilities > 0].double() - expected).square().div(expected).sum())
    return (statistic - free) / math.sqrt(2 * free)


@on_each_device
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.6},
        {"top_k": 12},
        {"top_p": 0.8},
        {"min_p": 0.2},
        {"top_k": 30, "top_p": 0.9, "min_p": 0.05},
    ],
    ids=str,
)
def test_frequencies_follow_the_probabilities(options: dict[str, float], device: str) -> None:
    """Over the positions of a few seeds' answers, and over seeds: 8,000 each."""
    logits = torch.randn(40, generator=torch.Generator().manual_seed(3))
    params = SamplingParams(**options)  # type: ignore[arg-type]
    probabilities = filtered_probabilities(logits, params)
    batch = Batch([replace(params, seed=seed) for seed in range(80)], 40, device)
    along = torch.cat([batch.draw(logits).tokens for _ in range(100)])
    across = drawn_many(logits, params, 8000, device)
    for tokens in (along, across):
        assert abs(chi_square(tokens.bincount(minlength=40), probabilities)) < 4


MIXED = (
    GREEDY,
    SamplingParams(seed=1),
    SamplingParams(seed=2, top_k=5),
    SamplingParams(seed=3, top_p=0.7, temperature=1.5),
    SamplingParams(seed=4, min_p=0.1, logprobs=3),
    SamplingParams(seed=5, top_k=9, top_p=0.9, min_p=0.01, frequency_penalty=0.5),
    replace(GREEDY, repetition_penalty=1.4, presence_penalty=-0.2),
    replace(GREEDY, logit_bias=((3, 4.0), (7, -100.0)), logprobs=0),
    SamplingParams(seed=1, repetition_penalty=0.8, logit_bias=((0, 1.5),)),
    replace(GREEDY, logprobs=20),
)


def answers_alone(steps: torch.Tensor, device: str) -> list[list[int]]:
    """Each of `MIXED` in a batch of its own; steps: [steps, rows, vocab]."""
    alone = []
    for row, params in enumerate(MIXED):
        batch = Batch([params], steps.shape[-1], device, prompt=(1, 4))
        alone.append([int(batch.draw(logits[row]).tokens) for logits in steps])
    return alone


@pytest.mark.parametrize("vocab", [13, 1000])
@on_each_device
def test_a_sequence_is_the_same_in_any_batch(device: str, vocab: int) -> None:
    random = torch.Generator().manual_seed(1)
    steps = torch.randn(12, len(MIXED), vocab, generator=random) * 2
    batch = Batch(MIXED, vocab, device, prompt=(1, 4))
    answers: list[list[int]] = [[] for _ in MIXED]
    while min(map(len, answers)) < len(steps):
        ready = [row for row, answer in enumerate(answers) if len(answer) < len(steps)]
        chosen = [ready[i] for i in torch.randperm(len(ready), generator=random)[: 1 + len(ready) // 2].tolist()]
        logits = torch.stack([steps[len(answers[row]), row] for row in chosen]).to(device)
        drawn = batch.sampler.draw(logits, chosen, [len(answers[row]) for row in chosen])
        for row, token in zip(chosen, drawn.tokens.tolist(), strict=True):
            answers[row].append(token)
    assert answers == answers_alone(steps, device)


@on_each_device
def test_a_sequence_resumes_in_another_row_as_if_nothing_had_been(device: str) -> None:
    """After preemption: what had been generated comes back as ids, and the row has been someone else's."""
    steps = torch.randn(10, len(MIXED), 13, generator=torch.Generator().manual_seed(2)) * 2
    alone = answers_alone(steps, device)
    sampler = BatchSampler(len(MIXED), 13, torch.device(device))
    for at in range(len(steps)):
        order = [(row + at) % len(MIXED) for row in range(len(MIXED))]
        for row, who in enumerate(order):
            sampler.begin(row, MIXED[who], MIXED[who].seed or 0, (1, 4), alone[who][:at])
        drawn = sampler.draw(steps[at, order].to(device), list(range(len(MIXED))), [at] * len(MIXED))
        assert drawn.tokens.tolist() == [alone[who][at] for who in order]


def test_a_seed_says_what_is_drawn() -> None:
    def draws(seed: int) -> list[int]:
        batch = Batch([SamplingParams(seed=seed)], 1000)
        return [int(batch.draw(torch.zeros(1000)).tokens) for _ in range(8)]

    assert draws(5) == draws(5)
    assert len({tuple(draws(seed)) for seed in (-(2**63), -3, 3, 0, 5, 6, 2**63 - 1)}) == 7


def test_the_numbers_are_splitmix64s() -> None:
    """Its first outputs for the state 1234567, as published with the algorithm's reference code."""
    published = (
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    )
    assert [uniform(1234567, index) for index in range(5)] == [(number >> 11) / 2**53 for number in published]


class Operations(TorchDispatchMode):
    """Which operations of torch run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name().partition(".")[0])
        return func(*args, **(kwargs or {}))


def test_greedy_alone_is_one_argmax_and_allocates_nothing_else() -> None:
    logits = torch.randn(3, 50)
    batch = Batch([GREEDY] * 3, 50)
    with Operations() as seen:
        tokens = batch.sampler.draw(logits, [0, 1, 2], [0, 0, 0]).tokens
    assert seen.names == ["aten::argmax"]
    assert tokens.tolist() == logits.argmax(-1).tolist()
    assert batch.sampler._penalties._counts.shape[0] == 0


@on_each_device
def test_greedy_among_others_is_the_argmax_to_the_bit(device: str) -> None:
    """bfloat16 logits have many ties: the first of equals wins, alone and in a mixed batch."""
    logits = torch.randn(6, 5000, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    batch = Batch([GREEDY, SamplingParams(seed=3), GREEDY, replace(GREEDY, logprobs=2), *MIXED[2:4]], 5000, device)
    got = batch.draw(logits).tokens
    assert got[[0, 2, 3]].tolist() == logits.float().argmax(-1)[[0, 2, 3]].tolist()


def adjusted(logits: torch.Tensor, params: SamplingParams, prompt: Sequence[int], said: Sequence[int]) -> list[float]:
    """A row's logits by the definitions, token by token."""
    bias = dict(params.logit_bias)
    values = []
    for token, value in enumerate(logits.tolist()):
        value += bias.get(token, 0.0)
        if token in prompt or token in said:
            value = value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
        times = list(said).count(token)
        values.append(value - params.frequency_penalty * times - params.presence_penalty * (times > 0))
    return values


TOKENS = st.integers(0, 5)
PENALTIES = st.builds(
    SamplingParams,
    temperature=st.just(0.0),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    repetition_penalty=st.floats(0.1, 2),
    logit_bias=st.dictionaries(TOKENS, st.floats(-100, 100), max_size=3).map(lambda bias: tuple(bias.items())),
)


@QUICK
@given(st.lists(PENALTIES, min_size=1, max_size=4), st.lists(TOKENS, min_size=1, max_size=5), st.integers(0, 2**32))
def test_penalties_and_biases_are_those_defined(params: list[SamplingParams], prompt: list[int], seed: int) -> None:
    """Greedy draws, each the best (within rounding) of logits adjusted by what the row itself was given before."""
    batch = Batch(params, 6, prompt=prompt)
    said: list[list[int]] = [[] for _ in params]
    for logits in torch.randn(8, len(params), 6, generator=torch.Generator().manual_seed(seed)) * 2:
        tokens = batch.draw(logits).tokens.tolist()
        for row, token in enumerate(tokens):
            values = adjusted(logits[row], params[row], prompt, said[row])
            assert values[token] > max(values) - 1e-4
            said[row].append(token)


def test_memory_for_penalties_is_taken_for_those_that_ask() -> None:
    sampler = BatchSampler(64, 10, torch.device("cpu"))
    asks = replace(GREEDY, presence_penalty=1.0)
    for row in (5, 9, 60):
        sampler.begin(row, asks, 0, [1], [2])
    assert sampler._penalties._counts.shape == (4, 10)
    for row in (5, 9, 60):
        sampler.begin(row, GREEDY, 0, [1], [2])
    for row in (0, 1, 2, 3):
        sampler.begin(row, asks, 0, [1], [])
    assert sampler._penalties._counts.shape == (4, 10)
    assert sampler._penalties._counts.sum() == 0, "what an earlier sequence said is still there"


@on_each_device
def test_logprobs_are_of_the_raw_logits(device: str) -> None:
    logits = torch.randn(len(MIXED), 30, generator=torch.Generator().manual_seed(4)) * 3
    drawn = Batch(MIXED, 30, device).draw(logits)
    asked = [params.logprobs for params in MIXED]
    log = logits.double().log_softmax(-1)
    for row, (token, logprob) in enumerate(drawn.read(asked)):
        assert token == int(drawn.tokens[row])
        assert (logprob is None) == (asked[row] is None)
        if logprob is None:
            continue
        assert logprob.token_id == token
        assert logprob.logprob == pytest.approx(float(log[row, token]), abs=1e-5)
        assert [each for each, _ in logprob.top] == log[row].topk(asked[row] or 0).indices.tolist()
        assert [value for _, value in logprob.top] == pytest.approx([float(log[row, each]) for each, _ in logprob.top])


def test_logprobs_are_left_out_where_nobody_asks_and_cut_to_the_vocabulary() -> None:
    assert Batch([GREEDY, SamplingParams()], 5).draw(torch.randn(2, 5)).logprobs is None
    none_more = Batch([replace(GREEDY, logprobs=0)], 5).draw(torch.randn(1, 5))
    assert none_more.logprobs is not None
    assert none_more.top_ids is None
    ((_, logprob),) = Batch([replace(GREEDY, logprobs=20)], 5).draw(torch.randn(1, 5)).read([20])
    assert logprob is not None
    assert len(logprob.top) == 5


@on_each_device
@pytest.mark.parametrize("broken", [float("nan"), float("-inf"), float("inf")])
def test_a_broken_row_gives_a_valid_id_and_leaves_the_others_alone(broken: float, device: str) -> None:
    logits = torch.randn(2 * len(MIXED), 50, generator=torch.Generator().manual_seed(5))
    sound = Batch(MIXED * 2, 50, device).draw(logits).tokens[::2]
    for count in (1, 50):
        logits[1::2, :count] = broken
        assert Batch(MIXED * 2, 50, device).draw(logits).tokens[::2].tolist() == sound.tolist()


def test_a_row_without_a_probability_gives_token_0() -> None:
    for broken in (float("nan"), float("-inf")):
        for options in ({}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.01}):
            params = SamplingParams(**options)  # type: ignore[arg-type]
            assert set(drawn_many(torch.full((9,), broken), params, 20).tolist()) == {0}


@pytest.mark.parametrize("options", [{}, {"top_k": 2}], ids=str)
def test_a_number_beyond_the_rounded_sum_takes_the_best(options: dict[str, int]) -> None:
    """1 stands for what rounding can make of numbers just below it: the last tokens have no probability at all."""
    logits = torch.tensor([[1.0, 2.0, float("-inf"), float("-inf")]])
    assert choose(logits, [Wish(SamplingParams(**options), 1.0)]).tolist() == [1]  # type: ignore[arg-type]


def test_a_token_that_is_not_a_number_is_not_drawn_while_there_are_others() -> None:
    logits = torch.tensor([float("nan"), 1.0, float("-inf"), 2.0])
    for options in ({}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.01}):
        assert set(drawn_many(logits, SamplingParams(**options), 100).tolist()) == {1, 3}  # type: ignore[arg-type]


@on_each_device
def test_the_coldest_and_the_hottest_stay_finite(device: str) -> None:
    logits = torch.tensor([-3e4, 3e4, 2.9e4])
    for temperature in (1e-30, 1e-5, 2.0):
        assert set(drawn_many(logits, SamplingParams(temperature=temperature), 20, device).tolist()) == {1}


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
        ("presence_penalty", 2.1),
        ("frequency_penalty", float("nan")),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 2.1),
        ("logit_bias", ((-1, 0.0),)),
        ("logit_bias", ((1, 100.5),)),
        ("logit_bias", ((1, float("nan")),)),
        ("logit_bias", ((1, 1.0), (1, 2.0))),
        ("logit_bias", tuple((i, 1.0) for i in range(301))),
        ("logprobs", -1),
        ("logprobs", 21),
    ],
)
def test_what_is_out_of_range_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(UserError, match=f"^{field}: "):
        SamplingParams(**{field: value})  # type: ignore[arg-type]
