"""Answers that must match a grammar, and answers that must not end too early."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from engines import KERNEL_WAYS, WAYS, tiny_engine
from tiny import tiny_tokenizer

from lragent.errors import UserError
from lragent.serve.engine.engine import Engine
from lragent.serve.engine.grammar import Grammar, Grammars
from lragent.serve.engine.types import Chunk, FinishReason, GenerationRequest, Prompt, SamplingParams

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 4}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
PROMPT = list(range(3, 40))


def run(engine: Engine, *wanted: SamplingParams, role: str = "plan") -> list[list[Chunk]]:
    """Each one's chunks; all run side by side."""
    chunks: list[list[Chunk]] = [[] for _ in wanted]
    for at, params in enumerate(wanted):
        engine.add(GenerationRequest(f"r{at}", role, Prompt(PROMPT[at:]), params), chunks[at].append)
    for _ in range(1000):
        if not engine.busy:
            return chunks
        engine.step()
    raise AssertionError("it does not end")


def text(chunks: list[Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


@pytest.mark.parametrize("way", ["plain", *KERNEL_WAYS])
@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_match_what_they_must(way: str, ahead: bool, temperature: float) -> None:
    engine = tiny_engine("base_lr_shared", ahead=ahead, **WAYS[way])
    common: dict[str, Any] = {"max_tokens": 200, "temperature": temperature, "seed": 3}
    schema, pattern, free = run(
        engine,
        SamplingParams(grammar=Grammar.json_schema(PERSON), **common),
        SamplingParams(grammar=Grammar.regex(r"[a-c]{3,5}-\d\d"), **common),
        SamplingParams(**(common | {"max_tokens": 30}), ignore_eos=True),
    )
    person = json.loads(text(schema))
    assert set(person) == {"name", "age"}
    assert 0 <= person["age"] <= 99
    assert re.fullmatch(r"[a-c]{3,5}-\d\d", text(pattern))
    assert schema[-1].finish_reason is pattern[-1].finish_reason is FinishReason.STOP
    assert free[-1].finish_reason is FinishReason.LENGTH
    engine._scheduler.check_integrity()
    assert engine.cache.base_pool.used_count == engine.cache.base_tree.size


def test_company_does_not_change_what_is_free() -> None:
    """One step is drawn for constrained and free answers; the free one is as it is alone."""
    params = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
    alone = run(tiny_engine("base_lr_shared"), params)[0]
    beside = run(
        tiny_engine("base_lr_shared", ahead=True),
        params,
        SamplingParams(max_tokens=60, grammar=Grammar.json_schema(PERSON), temperature=0.0),
    )[0]
    assert text(alone) == text(beside)


def test_a_preempted_answer_goes_on_where_it_was() -> None:
    """The cache holds one of three at a time, so each is preempted; their grammars must not forget what was said."""
    wanted = [
        SamplingParams(max_tokens=80, grammar=Grammar.regex(r"([a-f]{8}-){4}end"), temperature=1.0, seed=at)
        for at in range(3)
    ]
    alone = [text(run(tiny_engine("base_lr_shared"), params)[0]) for params in wanted]
    engine = tiny_engine("base_lr_shared", cache_tokens=128, max_model_len=128, check_integrity=True)
    together = [text(chunks) for chunks in run(engine, *wanted)]
    assert engine.stats().preempted > 0
    assert all(re.fullmatch(r"([a-f]{8}-){4}end", each) for each in together)
    assert together[0] == alone[0]


@pytest.mark.parametrize(
    ("grammar", "said"),
    [
        (Grammar.regex("(a"), "unclosed group"),
        (Grammar.regex("(?=a)b"), "look-around"),
        (Grammar.json_schema({"type": "foo"}), "Invalid type: foo"),
        (Grammar.json_schema({"type": "integer", "minimum": 5, "maximum": 3}), "Unsatisfiable"),
        (Grammar.json_schema({"$ref": "http://example.com/x"}), "does not fetch"),
        (Grammar.json_schema({"$ref": "#"}), ""),
        (Grammar.lark("start: nothing"), "nothing"),
        (Grammar.regex("a" * 300_000), "more than"),
    ],
)
def test_what_is_no_grammar_is_refused_at_once(grammar: Grammar, said: str) -> None:
    engine = tiny_engine("base_lr_shared")
    with pytest.raises(UserError, match=r"^grammar: ") as refused:
        engine.check(GenerationRequest("r", "plan", Prompt(PROMPT), SamplingParams(grammar=grammar)))
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_what_grows_too_complex_ends_its_own_request_only() -> None:
    """Found out in the middle of an answer: the request is at fault, and its neighbour does not notice."""
    engine = tiny_engine("base_lr_shared", ahead=True)
    hard = Grammar.regex(r"(.*a){30}.*b{500}(x|y|z){0,3000}")
    matcher = engine.grammars.matcher(hard)
    engine.grammars._kept[hard] = matcher
    calls = iter(range(1000))

    def allow(bits: Any) -> None:
        if next(calls) >= 2:
            raise UserError("grammar: it takes too much work.")
        bits.fill(-1)

    matcher.fresh = lambda: matcher  # type: ignore[method-assign]
    matcher.allow = allow  # type: ignore[method-assign]
    matcher.take = lambda token: None  # type: ignore[method-assign]
    broken, free = run(
        engine,
        SamplingParams(max_tokens=50, grammar=hard, ignore_eos=True),
        SamplingParams(max_tokens=20, ignore_eos=True),
    )
    assert broken[-1].finish_reason is FinishReason.ERROR
    assert isinstance(broken[-1].fault, UserError)
    assert free[-1].finish_reason is FinishReason.LENGTH
    engine._scheduler.check_integrity()


def test_a_grammar_is_compiled_once_and_begun_anew_each_time() -> None:
    grammars = Grammars(tiny_tokenizer(), len(tiny_tokenizer()), frozenset({2}))
    grammar = Grammar.regex("ab")
    first = grammars.matcher(grammar)
    for letter in "ab":
        first.take(tiny_tokenizer()(letter, add_special_tokens=False)["input_ids"][-1])
    assert first.ended
    assert not grammars.matcher(grammar).ended
    assert len(grammars._kept) == 1


@pytest.mark.parametrize("ahead", [False, True])
def test_no_end_before_its_time(ahead: bool) -> None:
    engine = tiny_engine("base_lr_shared", ahead=ahead)
    ends = engine.end_tokens
    bias = dict.fromkeys(ends, 100.0)  # it would end at once
    short, long = run(
        engine,
        SamplingParams(max_tokens=30, temperature=0.0, logit_bias=tuple(bias.items())),
        SamplingParams(max_tokens=30, temperature=0.0, logit_bias=tuple(bias.items()), min_tokens=7),
    )
    count = [sum(len(chunk.token_ids) for chunk in chunks) for chunks in (short, long)]
    assert count == [1, 8]


def test_stop_token_ids_end_and_are_not_told() -> None:
    engine = tiny_engine("base_lr_shared")
    (free,) = run(engine, SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True))
    ids = [token for chunk in free for token in chunk.token_ids]
    stop = ids[5]
    (stopped,) = run(engine, SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, stop_token_ids=(stop,)))
    assert [token for chunk in stopped for token in chunk.token_ids] == ids[: ids.index(stop) + 1]
    assert stopped[-1].finish_reason is FinishReason.STOP


def test_a_stop_string_may_be_part_of_the_text() -> None:
    engine = tiny_engine("base_lr_shared")
    (free,) = run(engine, SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True))
    whole = text(free)
    stop = whole[4:6]
    for include in (False, True):
        params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True, stop=(stop,), include_stop=include)
        (stopped,) = run(engine, params)
        assert text(stopped) == whole[: whole.index(stop) + (2 if include else 0)]


@pytest.mark.parametrize("ahead", [False, True])
def test_a_mask_is_asked_for_one_index_each(ahead: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every token of a constrained answer is masked by what was said up to it, once: none is drawn unmasked."""
    engine = tiny_engine("base_lr_shared", ahead=ahead)
    seen: list[int] = []
    constraint = engine._constraint

    def watched(params: SamplingParams) -> Any:
        made = constraint(params)
        allow = made.allow
        made.allow = lambda bits, index: seen.append(index) or allow(bits, index)
        return made

    monkeypatch.setattr(engine, "_constraint", watched)
    (chunks,) = run(engine, SamplingParams(max_tokens=40, grammar=Grammar.regex("(ab|cd){10}"), seed=1))
    assert seen == list(range(sum(len(chunk.token_ids) for chunk in chunks)))
    assert torch.isfinite(torch.tensor(seen)).all()
