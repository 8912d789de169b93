"""The engine in this process, as a script uses it."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny import make_adapter_set, save_tiny, tiny_model

from lragent.errors import UserError
from lragent.models import fingerprint
from lragent.pack import write_pack
from lragent.serve import Engine
from lragent.serve.engine.types import Chunk, FinishReason

ROLES = ("plan", "action", "reflect")
GREEDY = {"temperature": 0.0, "max_tokens": 6, "ignore_eos": True}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model folder and a pack of three roles."""
    place = tmp_path_factory.mktemp("local")
    folder, pack = save_tiny(place / "tiny"), place / "team.safetensors"
    write_pack(pack, replace(make_adapter_set(tiny_model(), ROLES), base_fingerprint=fingerprint(folder)))
    return folder, pack


@pytest.fixture(scope="module")
def engine(files: tuple[Path, Path]) -> Iterator[Engine]:
    folder, pack = files
    with Engine(str(folder), roles=pack, device="cpu", max_model_len=256, max_tokens_in_cache=2048) as made:
        yield made


def test_two_lines_are_enough(engine: Engine) -> None:
    answer = engine.generate("plan", "where is the inn?", **GREEDY)
    assert answer.text
    assert answer.finish_reason is FinishReason.LENGTH
    assert len(answer.token_ids) == 6


def test_text_ids_and_arrays_are_the_same_prompt(engine: Engine) -> None:
    ids = list(range(20, 40))
    expected = engine.generate("action", ids, **GREEDY).token_ids
    assert engine.generate("action", np.array(ids), **GREEDY).token_ids == expected
    assert engine.generate("base", ids, **GREEDY).token_ids != expected


def test_a_chat_reuses_what_another_role_has_read(engine: Engine) -> None:
    messages = [{"role": "user", "content": "where is the northern harbour?"}]
    said = engine.generate("plan", messages, **GREEDY)
    messages += [{"role": "assistant", "name": "plan", "content": said.text}, {"role": "tool", "content": "there"}]
    usage = engine.generate("reflect", messages, **GREEDY).usage
    assert usage is not None
    assert usage.base_reused > usage.tokens_computed


@pytest.mark.timeout(30)
@pytest.mark.parametrize("fails_at", [1, 6])
def test_who_watches_and_fails_ends_that_answer_only(engine: Engine, fails_at: int) -> None:
    seen: list[Chunk] = []

    def watch(chunk: Chunk) -> None:
        seen.append(chunk)
        if len(seen) == fails_at or chunk.finish_reason is not None:
            raise RuntimeError("the watcher is at fault")

    with pytest.raises(RuntimeError, match="the watcher is at fault"):
        engine.generate("plan", "where is the inn?", watch=watch, **GREEDY)
    seen.clear()
    answer = engine.generate("plan", "where is the inn?", watch=seen.append, **GREEDY)
    assert "".join(chunk.text for chunk in seen) == answer.text
    assert seen[-1].finish_reason is FinishReason.LENGTH


def test_many_at_once_are_in_order(engine: Engine) -> None:
    asked = [(ROLES[n % 3], list(range(20 + n, 40 + n))) for n in range(7)]
    together = engine.generate_many(asked, salt="many", **GREEDY)
    for (role, ids), answer in zip(asked, together, strict=True):
        assert engine.generate(role, ids, salt="alone", **GREEDY).token_ids == answer.token_ids


def test_streams_add_up_and_may_be_left(engine: Engine) -> None:
    whole = engine.generate("plan", list(range(20, 50)), **GREEDY)
    pieces = list(engine.stream("plan", list(range(20, 50)), **GREEDY))
    assert "".join(piece.text for piece in pieces) == whole.text
    assert pieces[-1].usage is not None
    started = engine.stream("plan", list(range(30, 60)), **{**GREEDY, "max_tokens": 150})
    next(started)
    started.close()
    engine.generate("base", [5], **GREEDY)
    assert engine.stats().running == 0


def test_event_loops_are_served_alike(engine: Engine) -> None:
    ids = list(range(20, 50))

    async def both() -> list[tuple[int, ...]]:
        answers = await asyncio.gather(*(engine.agenerate(role, ids, salt=f"loop {role}", **GREEDY) for role in ROLES))
        return [answer.token_ids for answer in answers]

    assert asyncio.run(both()) == [
        engine.generate(role, ids, salt=f"alone {role}", **GREEDY).token_ids for role in ROLES
    ]


def test_errors_name_what_is_wrong(engine: Engine, files: tuple[Path, Path]) -> None:
    with pytest.raises(UserError, match=r"^model: the role 'critic' is not loaded"):
        engine.generate("critic", "hello")
    with pytest.raises(UserError, match=r"^temprature: is no sampling parameter"):
        engine.generate("plan", "hello", temprature=1.0)
    with pytest.raises(UserError, match=r"^temperature: must be"):
        engine.stream("plan", "hello", temperature=9.0)
    with pytest.raises(UserError, match=r"^sharing: must be one of"):
        Engine(str(files[0]), sharing="everything")
    assert engine.roles == ("base", *ROLES)


@pytest.mark.parametrize("bad", [np.array([[5, 6], [7, 8]]), [1.5, 2.0], [[1], [2, 3]], [2**40], np.array(3)])
def test_what_is_no_list_of_ids_ends_that_request_only(engine: Engine, bad: object) -> None:
    with pytest.raises(UserError, match=r"^prompt: must be token ids, one list of integers"):
        engine.generate("plan", bad, **GREEDY)  # type: ignore[arg-type]  # that is the point
    assert engine.generate("plan", [5, 6, 7], **GREEDY).token_ids


def test_many_more_than_the_engine_takes_at_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lragent.serve.local.MOST_OPEN", 3)
    asked = [("plan", [5, 6, 7 + n]) for n in range(10)]
    assert len(engine.generate_many(asked, salt="few", **GREEDY)) == 10
    with pytest.raises(UserError, match="critic"):
        engine.generate_many([*asked, ("critic", [5])], **{**GREEDY, "max_tokens": 200})
    assert engine.stats().running == engine.stats().waiting == 0


def test_a_stream_that_is_dropped_before_its_first_piece_is_cancelled(engine: Engine) -> None:
    started = engine.stream("plan", [9, 8, 7], **{**GREEDY, "max_tokens": 200})
    del started
    engine.generate("plan", [5, 6, 7], **GREEDY)
    assert engine.stats().running == 0


@pytest.mark.parametrize(
    ("option", "value"),
    [("max_num_seqs", 0), ("max_num_batched_tokens", -1), ("max_tokens_in_cache", -5), ("gpu_memory_utilization", 7)],
)
def test_options_out_of_range_are_named(files: tuple[Path, Path], option: str, value: int) -> None:
    with pytest.raises(UserError, match=rf"^{option}: must be"):
        Engine(str(files[0]), device="cpu", **{option: value})  # type: ignore[arg-type]  # of several types


def test_an_engine_that_nobody_holds_ends(files: tuple[Path, Path]) -> None:
    engine = Engine(str(files[0]), device="cpu", max_model_len=64, max_tokens_in_cache=256)
    assert engine.generate("base", [5, 6], **GREEDY).token_ids
    thread, runner = engine._service._thread, weakref.ref(engine._service._engine._runner)
    del engine
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()
    gc.collect()
    assert runner() is None, "the model is held"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("logprobs", True), ("logprobs", 1.5), ("max_tokens", 2.5), ("max_tokens", None), ("seed", 1.5), ("top_k", "3"),
        ("temperature", None), ("temperature", "0"), ("presence_penalty", "1"), ("stop", [5]), ("logit_bias", [5]),
        ("logit_bias", {"a": 1.0}),
    ],
)  # fmt: skip
def test_a_field_of_another_kind_is_named_and_ends_that_request_only(engine: Engine, field: str, value: object) -> None:
    with pytest.raises(UserError, match=rf"^{field}: must"):
        engine.generate("plan", [5, 6, 7], **{field: value})
    assert engine.generate("plan", [5, 6, 7], **GREEDY).token_ids


def test_fields_may_come_as_clients_write_them(engine: Engine) -> None:
    ids = [5, 6, 7]
    whole = engine.generate("plan", ids, salt="forms", **GREEDY)
    word = whole.text[1:3]
    for stop in (word, [word], (word,)):
        assert engine.generate("plan", ids, salt="forms", stop=stop, **GREEDY).text == whole.text.split(word)[0]
    assert engine.generate("plan", ids, stop=None, logit_bias=None, **GREEDY).token_ids
    biased = engine.generate("plan", ids, logit_bias={9: 100}, **GREEDY).token_ids
    assert biased == engine.generate("plan", ids, logit_bias=[(9, 100.0)], **GREEDY).token_ids
    assert set(biased) == {9}
    kinds = {"seed": np.uint64(5), "top_k": np.int32(4), "max_tokens": np.int64(6), "temperature": np.float32(0.5)}
    assert engine.generate("plan", ids, **kinds).token_ids
