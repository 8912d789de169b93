"""The benchmark runs through on a tiny model, measures what it says, and refuses to rate a wrong engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from engines import tiny_engine
from tiny import make_adapter_set, save_tiny, tiny_model

from lragent.bench.__main__ import main
from lragent.bench.steps import Bench, play
from lragent.bench.traces import Planned, paper_trace, random_roles, random_tokens, trace_tokens
from lragent.errors import LRAgentError
from lragent.models import resolve_model
from lragent.modes import SharingMode


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("bench") / "tiny")


def test_the_trace_is_the_papers() -> None:
    trace = paper_trace(256)
    assert len(trace) == 17
    assert trace_tokens(trace) == 1936
    assert (trace[3].role, trace[3].new, trace[-1].role) == ("plan", 256, "reflect")


def test_random_roles_differ_and_fit() -> None:
    adapters = random_roles(tiny_model(), rank=4)
    assert adapters.module_paths == make_adapter_set(tiny_model()).module_paths
    assert not torch.equal(*next(iter(adapters.role_b.values()))[:2])


def test_playing_computes_only_what_is_new() -> None:
    trace = [Planned("plan", 20, 4), Planned("action", 3, 4), Planned("plan", 3, 2)]
    prompt = random_tokens(26, 280, seed=1)
    shared = play(tiny_engine("base_lr_shared"), trace, prompt, "")
    # An answer's last token was never run: the next step computes it with what is new.
    assert shared.computed == 20 + (1 + 3) + (1 + 3)
    alone = play(tiny_engine("non_shared"), trace, prompt, "")
    assert alone.computed == 20 + 27 + (34 - 23)
    assert [len(turn.prompt_ids) for turn in shared.turns] == [20, 27, 34]
    assert all(seconds > 0 for seconds in shared.ttft_s)


def test_steps_ends_with_its_numbers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["steps", "--model", str(folder), "--dtype", "float32", "--context", "4", "--repeats", "1", "--no-save"]
    assert main([*words, "--steps", "6"]) == 0
    numbers = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert numbers["first_tokens_as_peft"] == 1.0
    assert numbers["steps"] == 6
    assert set(numbers["ttft_sum_s"]) == {*map(str, SharingMode), "PEFT, prefilled anew", "PEFT, a cache per role"}
    assert numbers["tokens_computed"]["PEFT, prefilled anew"] > numbers["tokens_computed"]["PEFT, a cache per role"]
    # Both keep a cache per role of the same steps.
    assert numbers["tokens_computed"]["PEFT, a cache per role"] == numbers["tokens_computed"]["non_shared"]
    assert numbers["tokens_computed"]["base_lr_shared"] < numbers["tokens_computed"]["non_shared"]
    assert len(numbers["decode_tokens_per_s"]) == 4


def test_a_wrong_engine_is_given_no_speeds(folder: Path, tmp_path: Path) -> None:
    bench = Bench(resolve_model(str(folder)), None, [SharingMode.NON_SHARED], torch.float32, tmp_path)
    trace = [Planned("plan", 12, 2), Planned("action", 4, 2)]
    assert bench.check(trace) == 1.0
    runner = bench.engines[SharingMode.NON_SHARED]._runner
    forward = runner.forward
    runner.forward = lambda step, tensors: -forward(step, tensors)  # type: ignore[method-assign]
    with pytest.raises(LRAgentError, match="agree on 0%"):
        bench.check([Planned("plan", 13, 2), Planned("action", 4, 2)])


def test_what_cannot_be_run_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stairs"]) == 2
    assert "stairs" in capsys.readouterr().err
    assert main(["steps", "--repeats", "0"]) == 2
    assert "--repeats" in capsys.readouterr().err
    assert main([]) == 0
    assert "steps" in capsys.readouterr().out
