"""The benchmark of replicas: its sums, and a round of it as it is."""

from __future__ import annotations

import json

import pytest

from lragent.bench.replica_clients import Outcome, Part, split, summed
from lragent.bench.replicas import main, rate, rows


def test_a_load_is_cut_into_parts_with_tokens_of_their_own() -> None:
    parts = split(Part(256, 17, 10, 6, 300, 3, False), 4)
    assert [part.trajectories for part in parts] == [3, 3, 2, 2]
    assert [part.concurrent for part in parts] == [2, 2, 1, 1]
    assert len({part.seed for part in parts}) == 4


def test_figures_are_of_all_processes_together() -> None:
    one = Outcome(10.0, 14.0, 1000, [0.1, 0.2], 400, 100, 50, [], ["a"], 0)
    other = Outcome(11.0, 15.0, 500, [0.3], 100, 25, 50, [], [], 0)
    figures = summed([one, other])
    assert (figures["seconds"], figures["tokens_s"], figures["generated_s"]) == (5.0, 300.0, 20.0)
    assert (figures["ttft_ms"], figures["cached_share"], figures["failures"]) == (200.0, 0.25, ["a"])


def test_efficiency_is_of_one_replica_with_its_share_of_the_load() -> None:
    figures = {"requests_s": 1.0, "generated_s": 1.0, "ttft_ms": 1.0, "ttft_p95_ms": 1.0, "cached_share": 0.5}
    rounds = [
        {"replicas": 0, "concurrent": 4, "tokens_s": 80.0},
        {"replicas": 1, "concurrent": 4, "tokens_s": 100.0},
        {"replicas": 1, "concurrent": 8, "tokens_s": 150.0},
        {"replicas": 2, "concurrent": 8, "tokens_s": 170.0},
        {"replicas": 2, "concurrent": 8, "tokens_s": 190.0},
    ]
    none, *_, two = rows([each | figures for each in rounds])
    assert (two["tokens_s"], two["rounds"]) == (180.0, 2)
    assert (two["efficiency"], two["best_efficiency"]) == (0.9, 0.6)
    assert none["efficiency"] == 0.8


def test_a_round_without_any_answer_has_no_row_and_breaks_nothing() -> None:
    nothing = summed([Outcome(10.0, 12.0, 0, [], 0, 0, 0, [], ["HTTP 503"], 0)])
    assert (nothing["tokens_s"], nothing["ttft_ms"], nothing["failures"]) == (0.0, None, ["HTTP 503"])
    assert rows([{"replicas": 1, "concurrent": 4} | nothing]) == []


def test_a_rate_counts_answers_between_two_moments() -> None:
    assert rate([1.0, 2.0, 3.0, 9.0], 1.0, 4.0) == 1.0


@pytest.mark.slow
def test_a_short_round_with_a_kill(capsys: pytest.CaptureFixture[str]) -> None:
    words = "--device cpu --replicas 2 --concurrent 6 --waves 2 --steps 9 --slots 40000 --clients 1 --kill --no-save"
    assert main(words.split()) == 0
    numbers = json.loads(capsys.readouterr().out.splitlines()[-1])
    (row,) = numbers["rows"]
    assert row["tokens_s"] > 0
    assert row["cached_share"] > 0.5
    kill = numbers["kill"]
    assert kill["answered"] == kill["requests"] == 108
    assert kill["open_on_the_killed"] >= kill["streams_sent_again_by_the_client"]
    assert kill["recovery_s"] is not None
