"""`lragent serve --replicas 2` as its users have it: two processes of a tiny model, kill -9, an orderly end."""

from __future__ import annotations

import asyncio
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from replica_fakes import wait_for
from tiny import make_adapter_set, save_tiny, tiny_model

from lragent.models import fingerprint
from lragent.pack import write_pack
from lragent.peft_io import write_peft_folders
from lragent.serve.engine.build import build_service
from lragent.serve.engine.types import GenerationRequest, Prompt, SamplingParams

ROLES = ("plan", "action", "reflect")
BEGINS_S = 90.0
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A model folder, a pack of three roles, and a folder with a PEFT folder of one more."""
    place = tmp_path_factory.mktemp("replicated")
    folder, pack, more = save_tiny(place / "tiny"), place / "team.lrpack", place / "roles"
    adapters = replace(make_adapter_set(tiny_model(), ROLES), base_fingerprint=fingerprint(folder))
    write_pack(pack, adapters)
    write_peft_folders(adapters, more)
    return folder, pack, more


@pytest.fixture(scope="module")
def server(files: tuple[Path, Path, Path]) -> Iterator[tuple[httpx.Client, subprocess.Popen[str]]]:
    with served(files) as (url, process), httpx.Client(base_url=url, timeout=60, trust_env=False) as http:
        yield http, process


@contextmanager
def served(files: tuple[Path, Path, Path]) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    folder, pack, more = files
    words = [
        "--replicas",
        "2",
        "--port",
        "0",
        "--model",
        str(folder),
        "--roles",
        str(pack),
        "--roles-folder",
        str(more),
    ]
    words += ["--device", "cpu", "--max-model-len", "1024", "--max-tokens-in-cache", "8192", "--max-num-seqs", "8"]
    process = subprocess.Popen(
        [sys.executable, "-m", "lragent.cli.main", "serve", *words, "ledger=" + str(folder.parent / "usage.sqlite")],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        said = ""
        for line in process.stdout:
            said += line
            found = re.search(r"serving on (\S+)", line)
            if found:
                yield found[1], process
                return
        raise AssertionError(said)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(30)


def complete(http: httpx.Client, prompt: Any, model: str = "plan", **fields: Any) -> dict[str, Any]:
    asked = {"model": model, "prompt": prompt, "max_tokens": 6, "temperature": 0, "ignore_eos": True} | fields
    answer = http.post("/v1/completions", json=asked)
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def replicas_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return [
        each
        for each in psutil.Process(process.pid).children(recursive=True)
        if each.name().startswith("ray::ServeRepl") and each.status() != psutil.STATUS_ZOMBIE
    ]


def test_answers_are_those_of_one_engine(
    server: tuple[httpx.Client, subprocess.Popen[str]], files: tuple[Path, Path, Path]
) -> None:
    http, _ = server
    prompts = [[10 + at, 20, 30 + at, 40] * (1 + at) for at in range(6)]
    alone = build_service(model=str(files[0]), roles=str(files[1]), device="cpu", max_tokens_in_cache=8192)
    alone.start()
    try:
        for at, prompt in enumerate(prompts):
            params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
            expected = alone.generate(GenerationRequest(str(at), ROLES[at % 3], Prompt(prompt), params))
            said = complete(http, prompt, ROLES[at % 3], return_token_ids=True)["choices"][0]
            assert tuple(said["token_ids"]) == expected.token_ids
            assert said["text"] == expected.text
    finally:
        alone.stop(drain=False)


def test_a_conversation_stays_with_its_cache(server: tuple[httpx.Client, subprocess.Popen[str]]) -> None:
    http, _ = server
    talks: list[list[dict[str, str]]] = [[{"role": "user", "content": f"Question {at}?"}] for at in range(3)]
    sizes = [0] * len(talks)
    for turn in range(3):
        for at, messages in enumerate(talks):
            asked = {"model": ROLES[turn], "messages": messages, "max_tokens": 6, "temperature": 0}
            answer = http.post("/v1/chat/completions", json=asked).json()
            usage = answer["usage"]
            # All but the last token of the answer before, and what is new since.
            assert usage["lragent"]["base_reused"] >= max(0, sizes[at] - 1)
            sizes[at] = usage["prompt_tokens"] + usage["completion_tokens"] - 1
            messages += [answer["choices"][0]["message"], {"role": "user", "content": "And?"}]


def test_what_is_asked_badly_is_told_as_by_one_engine(server: tuple[httpx.Client, subprocess.Popen[str]]) -> None:
    http, _ = server
    for fields, status, param in (
        ({"model": "nobody"}, 404, "model"),
        ({"prompt": [5] * 2000}, 400, "prompt"),
        ({"prompt": [4_000_000]}, 400, "prompt"),
        ({"response_format": {"type": "regex", "pattern": "("}}, 400, "response_format"),
    ):
        answer = http.post("/v1/completions", json={"model": "plan", "prompt": "hello", "max_tokens": 4} | fields)
        assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)


def test_a_grammar_holds(server: tuple[httpx.Client, subprocess.Popen[str]]) -> None:
    http, _ = server
    form = {"type": "regex", "pattern": "(yes|no)"}
    assert complete(http, "so?", response_format=form, ignore_eos=False)["choices"][0]["text"] in ("yes", "no")


def test_a_killed_replica_loses_no_answer_and_comes_back(
    server: tuple[httpx.Client, subprocess.Popen[str]],
) -> None:
    http, process = server
    loaded = http.post("/v1/load_lora_adapter", json={"lora_name": "late", "lora_path": "plan"})
    assert loaded.status_code == 200, loaded.text
    expected = complete(http, "before", max_tokens=200)["choices"][0]["text"]

    async def work() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=http.base_url, timeout=60, trust_env=False) as many:
            asked = {"model": "plan", "max_tokens": 200, "temperature": 0, "ignore_eos": True}
            answers = [
                asyncio.create_task(many.post("/v1/completions", json=asked | {"prompt": prompt}))
                for prompt in ["before", *(f"prompt {at}" for at in range(19))]
            ]
            while not await busy(many):
                await asyncio.sleep(0.01)
            replicas_of(process)[0].kill()
            return await asyncio.gather(*answers)

    async def busy(many: httpx.AsyncClient) -> bool:
        lines = (await many.get("/metrics")).text.splitlines()
        return sum(1 for line in lines if re.match(r"lragent:replica_requests_open.* [1-9]", line)) == 2

    answers = asyncio.run(work())
    assert [answer.status_code for answer in answers] == [200] * 20
    assert answers[0].json()["choices"][0]["text"] == expected
    left = re.findall(r"^lragent:replica_requests_left\S* (\S+)", http.get("/metrics").text, re.MULTILINE)
    assert sum(map(float, left)) >= 1
    wait_for(lambda: http.get("/health").json()["replicas"] == {"alive": 2, "of": 2}, BEGINS_S)
    for at in range(4):  # on both replicas
        complete(http, f"anew {at}", "late")


def test_what_requests_cost_is_added_up_once(server: tuple[httpx.Client, subprocess.Popen[str]]) -> None:
    http, _ = server
    before = http.get("/v1/usage").json()["total"]["requests"]
    for at in range(3):
        complete(http, f"counted {at}")
    assert http.get("/v1/usage").json()["total"]["requests"] == before + 3
    state = http.get("/page/state.json").json()
    assert [each["alive"] for each in state["replicas"]] == [True, True]
    ids = [node["id"] for node in state["cache"]["nodes"]]
    assert len(set(ids)) == len(ids) > 2


def test_ports_are_closed_to_others(server: tuple[httpx.Client, subprocess.Popen[str]]) -> None:
    """All are on loopback but one of each replica, which Ray Serve opens everywhere: it asks for the token."""
    import grpc

    _, process = server
    open_to_all = [
        connection.laddr.port
        for each in psutil.Process(process.pid).children(recursive=True)
        for connection in each.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and not connection.laddr.ip.endswith("127.0.0.1")
    ]
    assert len(open_to_all) == 2
    for port in open_to_all:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            with pytest.raises(grpc.RpcError) as refused:
                channel.unary_unary("/ray.serve.ASGIService/HandleRequest")(b"", timeout=10)
            assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_the_end_is_orderly(server: tuple[httpx.Client, subprocess.Popen[str]]) -> None:
    _, process = server
    ours = psutil.Process(process.pid).children(recursive=True)
    folder = next(word for each in ours for word in re.findall(r"/\S*/lragent-\w+", " ".join(each.cmdline())))
    assert len(ours) >= 4
    assert Path(folder).is_dir()
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    gone, alive = psutil.wait_procs(ours, timeout=20)
    assert alive == []
    assert len(gone) == len(ours)
    assert not Path(folder).exists()


def test_a_replica_that_cannot_begin_is_told_in_one_sentence(files: tuple[Path, Path, Path]) -> None:
    words = ["serve", "--replicas", "2", "--port", "0", "--model", str(files[0]), "--roles", str(files[0] / "none")]
    ended = subprocess.run(
        [sys.executable, "-m", "lragent.cli.main", *words], capture_output=True, text=True, timeout=120
    )
    assert ended.returncode != 0
    assert "Traceback" not in ended.stderr
    assert "none" in ended.stderr
