"""The official client against the real engine, with a tiny model, over a loopback port."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from api_fakes import live_server, wait_until
from real_engine import QUESTION, ROLES, build_tiny

from lragent.serve.engine.service import EngineService


def say(client: openai.OpenAI, role: str, messages: list[Any], **options: Any) -> Any:
    return client.chat.completions.create(model=role, messages=messages, temperature=0, max_tokens=12, **options)


def test_the_cards_are_the_packs(client: openai.OpenAI, files: tuple[Path, Path]) -> None:
    base, *roles = client.models.list().data
    assert (base.id, base.model_dump()["max_model_len"]) == ("tiny", 1024)
    assert [role.id for role in roles] == list(ROLES)
    assert {role.model_dump()["root"] for role in roles} == {str(files[1])}


def test_a_trajectory_over_roles_computes_only_what_is_new(client: openai.OpenAI) -> None:
    """Answers go back as they came; each step finds all that earlier ones, by whichever role, have left."""
    messages: list[Any] = list(QUESTION)
    before = 0
    for step, role in enumerate(("plan", "action", "action", "reflect", "base", "plan")):
        answer = say(client, role, messages)
        usage = answer.usage.model_dump()
        assert usage["lragent"]["tokens_computed"] + usage["lragent"]["base_reused"] == usage["prompt_tokens"]
        assert usage["prompt_tokens_details"]["cached_tokens"] == usage["lragent"]["base_reused"]
        if step:
            assert usage["lragent"]["base_reused"] >= before - 1, role
        before = usage["prompt_tokens"] + usage["completion_tokens"]
        messages.append(answer.choices[0].message.model_dump())
        if step % 2:
            messages.append({"role": "tool", "content": [{"type": "text", "text": f"result {step}"}]})


def test_a_stream_is_the_same_answer(client: openai.OpenAI) -> None:
    whole = say(client, "action", QUESTION)
    options = {"include_usage": True}
    *chunks, last = say(client, "action", QUESTION, stream=True, stream_options=options)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert last.usage.prompt_tokens_details.cached_tokens > 0


def test_roles_answer_differently(client: openai.OpenAI) -> None:
    answers = [client.completions.create(model=role, prompt="the inn", temperature=0) for role in ("base", *ROLES)]
    assert len({answer.choices[0].text for answer in answers}) > 1


def test_text_and_its_ids_are_the_same_prompt(client: openai.OpenAI, service: EngineService) -> None:
    ids = service.tokenizer("the inn and the stone").input_ids
    options: dict[str, Any] = {"model": "plan", "temperature": 0, "max_tokens": 9, "extra_body": {"ignore_eos": True}}
    text, tokens = (client.completions.create(prompt=prompt, **options) for prompt in ("the inn and the stone", ids))
    assert text.choices[0].text == tokens.choices[0].text
    assert text.usage.prompt_tokens == tokens.usage.prompt_tokens == len(ids)
    assert text.usage.completion_tokens == 9
    assert tokens.usage.prompt_tokens_details.cached_tokens == len(ids) - 1


def test_many_at_once_are_the_same_as_one_by_one(client: openai.OpenAI) -> None:
    """Each with a salt of its own: who wrote a common prefix would depend on who came first."""
    asked = [(role, f"question {number}") for number in range(3) for role in ("base", *ROLES)]

    def ask(index: int, salt: str) -> str:
        role, prompt = asked[index]
        body = {"cache_salt": f"{salt} {index}", "ignore_eos": True}
        answer = client.completions.create(model=role, prompt=prompt, temperature=0, max_tokens=6, extra_body=body)
        assert answer.usage.completion_tokens == 6
        return answer.choices[0].text

    one_by_one = [ask(index, "one by one") for index in range(len(asked))]
    with ThreadPoolExecutor(6) as pool:
        at_once = list(pool.map(lambda index: ask(index, "at once"), range(len(asked))))
    assert at_once == one_by_one


def test_a_salt_keeps_tenants_apart(client: openai.OpenAI) -> None:
    def cached(salt: str) -> int:
        answer = say(client, "plan", QUESTION, extra_body={"cache_salt": salt})
        return answer.usage.prompt_tokens_details.cached_tokens

    assert cached("one") == 0
    assert cached("two") == 0
    assert cached("one") > 0


def test_a_seed_repeats_itself(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "plan", "prompt": "the", "max_tokens": 12, "extra_body": {"ignore_eos": True}}
    first, again, other = (client.completions.create(seed=seed, **options).choices[0].text for seed in (5, 5, 6))
    assert first == again != other


@pytest.mark.parametrize("stream", [False, True])
def test_ids_and_logprobs_are_those_of_all_tokens(client: openai.OpenAI, service: EngineService, stream: bool) -> None:
    extra = {"return_token_ids": True, "ignore_eos": True, "repetition_penalty": 1.2}
    options: dict[str, Any] = {"model": "plan", "prompt": "the inn", "max_tokens": 9, "logprobs": 2, "stream": stream}
    answer = client.completions.create(**options, seed=3, extra_body=extra)
    parts: list[Any] = [each.choices[0] for each in (answer if stream else [answer])]
    assert parts[0].prompt_token_ids == service.tokenizer("the inn").input_ids
    ids = [token for part in parts for token in part.token_ids]
    assert len(ids) == sum(len(part.logprobs.tokens) for part in parts) == 9
    assert service.tokenizer.decode(ids, skip_special_tokens=True) == "".join(part.text for part in parts)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_leaves_nothing_running(http: httpx.Client, service: EngineService, stream: bool) -> None:
    wait_until(lambda: service.stats().running == 0)
    body = {"model": "plan", "prompt": "the", "max_tokens": 1000, "ignore_eos": True, "stream": stream}
    finished = service.stats().finished
    if stream:
        with http.stream("POST", "/v1/completions", json=body) as answer:
            pieces = answer.iter_bytes()  # held: dropping it closes the connection
            next(pieces)
            wait_until(lambda: service.stats().running == 1)
    else:
        with pytest.raises(httpx.ReadTimeout):
            http.post("/v1/completions", json=body, timeout=0.3)
    wait_until(lambda: service.stats().finished > finished and service.stats().running == 0)
    stats = service.stats()
    assert stats.generated < 1000 + 500
    assert stats.slots_used == stats.slots_cached


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"prompt": [299, 300]}, "prompt"),
        ("/v1/completions", {"prompt": [-1]}, "prompt"),
        ("/v1/completions", {"prompt": ""}, "prompt"),
        ("/v1/completions", {"prompt": [5] * 1024}, "prompt"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 2000}]}, "messages"),
        ("/v1/chat/completions", {"messages": []}, "messages"),
        ("/v1/chat/completions", {"messages": [*QUESTION, {"role": "user", "content": 7}]}, "messages[2].content"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ("/v1/chat/completions", {"messages": QUESTION, "max_tokens": 1025}, "max_tokens"),
        ("/v1/chat/completions", {"messages": QUESTION, "logit_bias": {"300": 1}, "stream": True}, "logit_bias"),
    ],
)
def test_what_the_engine_refuses_is_a_400(http: httpx.Client, path: str, body: dict[str, Any], param: str) -> None:
    answer = http.post(path, json={"model": "plan"} | body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


@pytest.mark.parametrize("broken", ["runner.Runner.launch", "scheduler.Scheduler.remove"])
def test_a_fault_of_the_engine_ends_open_requests_and_is_told_by_health(
    files: tuple[Path, Path], broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever breaks in the loop, nobody waits for ever."""
    service = build_tiny(files)
    service.start()

    def fail(*_: object) -> None:
        raise RuntimeError("a bit has flipped")

    with live_server(service) as url, httpx.Client(base_url=url, timeout=10, trust_env=False) as http:
        body = {"model": "plan", "prompt": "the", "max_tokens": 3}
        assert http.post("/v1/completions", json=body).status_code == 200
        monkeypatch.setattr(f"lragent.serve.engine.{broken}", fail)
        with ThreadPoolExecutor(2) as pool:
            answers = list(pool.map(lambda _: http.post("/v1/completions", json=body), range(2)))
        assert {answer.status_code for answer in answers} <= {500, 503}
        wait_until(lambda: not service.alive)
        assert http.get("/health").status_code == 503
        assert http.post("/v1/completions", json=body).status_code == 503


def test_the_command(files: tuple[Path, Path]) -> None:
    """`lragent serve` prints its address, answers there, and ends in order; a taken port is one sentence."""
    command = [sys.executable, "-m", "lragent.cli.main", "serve", "--model", str(files[0]), "--roles", str(files[1])]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, "--port", "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("lragent: serving on http://127.0.0.1:"), process.communicate()
        url = line.split()[-1]
        with openai.OpenAI(
            base_url=f"{url}/v1", api_key="none", http_client=openai.DefaultHttpxClient(trust_env=False)
        ) as client:
            assert say(client, "reflect", QUESTION).choices[0].message.model_dump()["name"] == "reflect"
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=20)
        assert (process.returncode, out) == (0, "")
        assert "Traceback" not in err
    finally:
        process.kill()
        process.communicate()


def test_the_command_says_in_one_sentence_that_a_port_is_taken(files: tuple[Path, Path]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        command = [sys.executable, "-m", "lragent.cli.main", "serve", "--port", str(taken.getsockname()[1])]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert len(ended.stderr.strip().splitlines()) == 1
    assert "cannot listen" in ended.stderr
