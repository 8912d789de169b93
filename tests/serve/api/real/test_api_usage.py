"""Metrics, the ledger and budgets over HTTP, with the real engine: all must say the same."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_fakes import FakeService, live_server, wait_until
from prometheus_client.parser import text_string_to_metric_families
from real_engine import QUESTION, build_tiny

from lragent.serve.api.settings import ServeSettings
from lragent.serve.engine.service import EngineService
from lragent.serve.ledger.budgets import Budget
from lragent.serve.ledger.ledger import Ledger
from lragent.serve.ledger.prices import Prices

PRICES = Prices("USD", 1_000_000, fresh=1.0, reused=0.1, generated=4.0)
FIELDS = ("prompt_tokens", "tokens_computed", "base_reused", "lr_reused", "lr_prefilled", "generated")


@pytest.fixture
def service(files: tuple[Path, Path]) -> Iterator[EngineService]:
    """One for each test: they look at its counters."""
    built = build_tiny(files)
    built.start()
    yield built
    built.stop(drain=False)


class Served:
    """A server with a ledger."""

    def __init__(self, service: EngineService, http: httpx.Client, ledger: Ledger) -> None:
        self.service, self.http, self.ledger = service, http, ledger

    def chat(self, role: str = "plan", status: int = 200, **more: Any) -> httpx.Response:
        body = {"model": role, "messages": QUESTION, "max_tokens": 8, "temperature": 0, "ignore_eos": True} | more
        answer = self.http.post("/v1/chat/completions", json=body)
        assert answer.status_code == status, answer.text
        return answer

    def usage(self, **query: Any) -> dict[str, Any]:
        answer = self.http.get("/v1/usage", params=query)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def metrics(self) -> dict[str, float]:
        """By name and labels, without the model's."""
        found = {}
        for family in text_string_to_metric_families(self.http.get("/metrics").text):
            for sample in family.samples:
                labels = {name: value for name, value in sample.labels.items() if name != "model_name"}
                found[sample.name + (json.dumps(labels, sort_keys=True) if labels else "")] = sample.value
        return found


@contextmanager
def serve(service: EngineService, tmp_path: Path, *budgets: Budget, **settings: Any) -> Iterator[Served]:
    ledger = Ledger(tmp_path / "ledger.sqlite", PRICES, budgets)
    try:
        with (
            live_server(service, ServeSettings(port=0, **settings), ledger) as url,
            httpx.Client(base_url=url, timeout=60, trust_env=False) as http,
        ):
            yield Served(service, http, ledger)
    finally:
        ledger.close()


def test_the_ledger_is_the_engines_counters_to_the_token(service: EngineService, tmp_path: Path) -> None:
    with serve(service, tmp_path) as served:
        served.chat("plan", trajectory_id="t1")
        served.chat("action", trajectory_id="t1")
        served.chat("base", n=3, seed=1, temperature=1.0)
        served.chat("plan", stream=True, trajectory_id="t2")
        served.http.post("/v1/completions", json={"model": "reflect", "prompt": ["a", "b"], "max_tokens": 3})
        body = {"model": "plan", "messages": QUESTION, "max_tokens": 400, "stream": True, "ignore_eos": True}
        with served.http.stream("POST", "/v1/chat/completions", json=body) as answer:
            next(answer.iter_lines())
        wait_until(lambda: not service.stats().running)
        served.chat("plan", 400, temperature=-1)
        report = served.usage(group_by="role")
        stats = service.stats()
        assert report["total"]["requests"] == stats.finished == 9
        for field in FIELDS:
            assert report["total"][field] == getattr(stats, field)
            assert sum(group[field] for group in report["groups"]) == getattr(stats, field)
        for group in report["groups"]:
            sums = stats.roles[group["name"]]
            assert (group["requests"], group["generated"]) == (sums.finished, sums.generated)
        assert stats.drawn == stats.generated
        cost = (
            report["total"]["tokens_computed"] * 1.0
            + (report["total"]["prompt_tokens"] - report["total"]["tokens_computed"]) * 0.1
            + report["total"]["generated"] * 4.0
        ) / 1e6
        assert report["total"]["cost"] == pytest.approx(cost, rel=1e-12)
        assert report["total"]["kv_byte_seconds"] > 0
        assert served.usage(trajectory="t1")["total"]["requests"] == 2
        by_trajectory = {group["name"]: group["requests"] for group in served.usage(group_by="trajectory")["groups"]}
        assert by_trajectory == {"": 6, "t1": 2, "t2": 1}


def test_metrics_have_vllms_names_and_say_the_same(service: EngineService, tmp_path: Path) -> None:
    with serve(service, tmp_path) as served:
        served.chat("plan")
        served.chat("action", stream=True)
        seen, stats = served.metrics(), service.stats()
        assert seen["vllm:num_requests_running"] == seen["vllm:num_requests_waiting"] == 0
        assert 0 < seen["vllm:kv_cache_usage_perc"] <= 1
        assert seen["vllm:prompt_tokens_total"] == stats.prompt_tokens == seen["vllm:prefix_cache_queries_total"]
        assert seen["vllm:prefix_cache_hits_total"] == stats.prompt_tokens - stats.tokens_computed > 0
        assert seen["vllm:generation_tokens_total"] == 16
        assert seen["vllm:num_preemptions_total"] == 0
        assert seen['vllm:request_success_total{"finished_reason": "length"}'] == 2
        for name, count in (("time_to_first_token", 2), ("e2e_request_latency", 2), ("inter_token_latency", 14)):
            assert seen[f"vllm:{name}_seconds_count"] == seen[f'vllm:{name}_seconds_bucket{{"le": "+Inf"}}'] == count
            assert seen[f"vllm:{name}_seconds_sum"] > 0
        assert any(name.startswith("vllm:lora_requests_info") for name in seen)
        assert seen['lragent:lr_tokens_reused_total{"role": "action"}'] == stats.roles["action"].lr_reused
        assert seen['lragent:base_tokens_reused_total{"role": "action"}'] > 0
        assert seen['lragent:cache_bytes{"part": "lr", "state": "used"}'] > 0
        assert seen["lragent:ledger_pending"] == 0


def test_tools_tokens_are_told_apart(service: EngineService, tmp_path: Path) -> None:
    with serve(service, tmp_path) as served:
        served.chat()
        assert served.usage()["total"]["tool_tokens"] == 0
        said = {"role": "assistant", "name": "plan", "content": "Search"}
        messages = [*QUESTION, said, {"role": "tool", "content": "abcdefghij"}]
        served.chat(messages=messages)
        first = served.usage()["total"]["tool_tokens"]
        assert 8 <= first <= 12
        served.chat(messages=messages)
        assert served.usage()["total"]["tool_tokens"] == first


def test_a_budget_says_what_is_left_and_then_refuses(service: EngineService, tmp_path: Path) -> None:
    limit = 0.0005
    with serve(service, tmp_path, Budget("trajectory", limit), Budget("role", 1.0, hard=False)) as served:
        body = {"trajectory_id": "t1", "cache_salt": "fresh"}
        left = limit
        for _ in range(3):
            answer = served.chat(**body)
            budget = answer.json()["usage"]["lragent"]["budgets"][0]
            assert (budget["scope"], budget["name"], budget["hard"]) == ("trajectory", "t1", True)
            assert budget["left"] < left
            left = budget["left"]
            said = answer.headers["x-lragent-budget-left"]
            assert said == f"{left:.9g}; trajectory=t1"
        assert left == pytest.approx(limit - served.usage(trajectory="t1")["total"]["cost"])
        for _ in range(100):
            answer = served.http.post("/v1/chat/completions", json={
                "model": "plan", "messages": QUESTION, "max_tokens": 20, "temperature": 0, "ignore_eos": True, **body,
            })  # fmt: skip
            if answer.status_code != 200:
                break
        assert answer.status_code == 429
        error = answer.json()["error"]
        assert error["code"] == "over_budget"
        assert re.match(r"trajectory: the budget of 't1' has .* left, and this request may cost", error["message"])
        assert "retry-after" not in answer.headers
        served.chat(trajectory_id="t2")
        assert served.usage(trajectory="t1")["total"]["cost"] <= limit
        streamed = served.chat(trajectory_id="t2", stream=True, stream_options={"include_usage": True})
        assert "trajectory=t2" in streamed.headers["x-lragent-budget-left"]
        last = json.loads(streamed.text.split("\n\n")[-3].removeprefix("data: "))
        assert last["usage"]["lragent"]["budgets"][0]["name"] == "t2"


def test_no_name_breaks_the_header(service: EngineService, tmp_path: Path) -> None:
    with serve(service, tmp_path, Budget("trajectory", 1.0)) as served:
        for name in ("a\r\nX-Forged: 1", "\0\x7f", "; role=x", "\U0001f642 é", " "):
            for stream in (False, True):
                answer = served.chat(trajectory_id=name, stream=stream, max_tokens=2)
                assert "x-forged" not in answer.headers
                assert re.fullmatch(r"[0-9.]+; trajectory=[!-:<-~]+", answer.headers["x-lragent-budget-left"])


def test_many_at_once_cannot_overspend(service: EngineService, tmp_path: Path) -> None:
    limit = 0.001
    with serve(service, tmp_path, Budget("role", limit, name="plan")) as served, ThreadPoolExecutor(12) as pool:

        def ask(at: int) -> int:
            body = {"model": "plan", "messages": QUESTION, "max_tokens": 12, "ignore_eos": True, "cache_salt": f"{at}"}
            return served.http.post("/v1/chat/completions", json=body).status_code

        statuses = list(pool.map(ask, range(60)))
        assert set(statuses) == {200, 429}
        spent = served.usage(role="plan")["total"]["cost"]
        assert 0 < spent <= limit
        (budget,) = served.usage()["budgets"]
        assert budget["left"] == pytest.approx(limit - spent)
        served.chat("action")


def test_an_answer_of_no_length_is_cut_to_what_is_left(service: EngineService, tmp_path: Path) -> None:
    with serve(service, tmp_path, Budget("role", 0.0005)) as served:
        body = {"model": "plan", "messages": QUESTION, "temperature": 0, "ignore_eos": True}
        answer = served.http.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200
        assert answer.json()["choices"][0]["finish_reason"] == "length"
        assert 10 < answer.json()["usage"]["completion_tokens"] < 125
        assert served.usage()["total"]["cost"] <= 0.0005


def test_a_restart_remembers_what_was_spent(files: tuple[Path, Path], tmp_path: Path) -> None:
    costs = []
    for _ in range(2):
        built = build_tiny(files)
        built.start()
        try:
            with serve(built, tmp_path, Budget("role", 1.0)) as served:
                served.chat()
                costs.append(served.usage()["total"]["cost"])
                (budget,) = served.usage()["budgets"]
                assert budget["left"] == pytest.approx(1.0 - costs[-1])
                assert served.usage(run="current")["total"]["requests"] == 1
        finally:
            built.stop(drain=False)
    assert costs[1] == pytest.approx(2 * costs[0])


def test_who_sees_what(service: EngineService, tmp_path: Path) -> None:
    keys = {"alice": "alice-secret", "bob": "bob-secret-2"}
    settings = {"api_key": tuple(f"{name}={secret}" for name, secret in keys.items()), "admin_key": "admin-secret"}
    with serve(service, tmp_path, Budget("key", 1.0), **settings) as served:
        for name, secret in keys.items():
            served.http.headers["authorization"] = f"Bearer {secret}"
            for _ in range(1 + (name == "bob")):
                served.chat()
        mine = served.usage(group_by="key", key="alice")
        assert mine["total"]["requests"] == 2
        assert [group["name"] for group in mine["groups"]] == ["bob"]
        assert [budget["name"] for budget in mine["budgets"]] == ["bob"]
        served.http.headers["authorization"] = "Bearer admin-secret"
        everybody = served.usage(group_by="key")
        assert {group["name"]: group["requests"] for group in everybody["groups"]} == {"alice": 1, "bob": 2}


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("group_by=cost", "group_by"), ("since=x", "since"), ("since=nan", "since"), ("until=-1", "until"),
        ("limit=0", "limit"), ("limit=9999999", "limit"), ("role=a&role=b", "role"), ("wrong=1", "wrong"),
        ("role=" + "x" * 600, "role"), ("limit=1e3", "limit"),
    ],
)  # fmt: skip
def test_bad_queries(service: EngineService, tmp_path: Path, query: str, param: str) -> None:
    with serve(service, tmp_path) as served:
        answer = served.http.get(f"/v1/usage?{query}")
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == param


def test_without_a_ledger_there_is_no_usage() -> None:
    with live_server(FakeService()) as url:
        answer = httpx.get(f"{url}/v1/usage", trust_env=False)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "no_ledger")


def test_a_request_that_takes_too_long_is_ended(service: EngineService, tmp_path: Path) -> None:
    with serve(service, tmp_path, request_timeout_s=0.3) as served:
        slow = {"max_tokens": 900}
        original = service._engine.step
        stop = threading.Event()
        service._engine.step = lambda: (stop.wait(0.02), original())  # type: ignore[method-assign,assignment]
        answer = served.chat(status=504, **slow)
        assert answer.json()["error"]["code"] == "timeout"
        streamed = served.chat(stream=True, **slow)
        assert '"code":"timeout"' in streamed.text.split("\n\n")[-2]
        service._engine.step = original  # type: ignore[method-assign]
        wait_until(lambda: not service.stats().running)
        assert served.usage()["total"]["requests"] == 2
        served.chat()
