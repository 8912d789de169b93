"""Roles that are loaded and unloaded over HTTP, and every path from which none may be loaded."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import safetensors.torch
import torch
from api_fakes import FakeService, live_server, wait_until
from tiny import make_adapter_set, save_tiny, tiny_model

from lragent.adapter_set import AdapterSet
from lragent.models import fingerprint
from lragent.pack import write_pack
from lragent.peft_io import CONFIG, WEIGHTS, write_peft_folders
from lragent.serve.api.settings import ServeSettings
from lragent.serve.engine.build import build_service
from lragent.serve.engine.service import EngineService

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
QUESTION = [{"role": "user", "content": "Where is the northern harbour?"}]


def only(adapters: AdapterSet, *names: str) -> AdapterSet:
    at = [adapters.role_index(name) for name in names]
    role_b = {path: b[at] for path, b in adapters.role_b.items()}
    return dataclasses.replace(adapters, roles=tuple(adapters.roles[i] for i in at), role_b=role_b)


def other_b(adapters: AdapterSet) -> AdapterSet:
    return dataclasses.replace(adapters, role_b={path: 3.0 * b.flip(0) for path, b in adapters.role_b.items()})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def adapters(place: Path) -> AdapterSet:
    folder = save_tiny(place / "tiny")
    made = make_adapter_set(tiny_model(), ("plan", "action", "extra"))
    return dataclasses.replace(made, base_fingerprint=fingerprint(folder))


@pytest.fixture(scope="module")
def roles(place: Path, adapters: AdapterSet) -> Path:
    """The server's folder of roles, with all kinds of things in and beside it."""
    roles = place / "roles"
    roles.mkdir()
    write_pack(roles / "team.safetensors", only(adapters, "plan", "action"))
    write_pack(roles / "all.safetensors", adapters)
    write_pack(roles / "other.safetensors", other_b(adapters))
    write_pack(place / "outside.safetensors", adapters)
    write_peft_folders(only(adapters, "extra"), roles / "peft")
    write_peft_folders(dataclasses.replace(only(adapters, "extra"), base_fingerprint=None), roles / "trusted")
    return roles


@pytest.fixture
def service(place: Path, roles: Path) -> Iterator[EngineService]:
    built = build_service(
        model=str(place / "tiny"), roles=str(roles / "team.safetensors"), dtype="float32", device="cpu",
        max_model_len=512, max_tokens_in_cache=4096, max_num_seqs=8, max_roles=4, check_integrity=True,
    )  # fmt: skip
    built.start()
    yield built
    built.stop(drain=False)


@pytest.fixture
def http(service: EngineService, roles: Path) -> Iterator[httpx.Client]:
    settings = ServeSettings(port=0, roles_folder=roles)
    with live_server(service, settings) as url, httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
        yield client


def say(http: httpx.Client, role: str, **more: Any) -> dict[str, Any]:
    body = {"model": role, "messages": QUESTION, "max_tokens": 12, "temperature": 0, "ignore_eos": True} | more
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def text(answer: dict[str, Any]) -> str:
    return answer["choices"][0]["message"]["content"]


def served(http: httpx.Client) -> list[str]:
    return [card["id"] for card in http.get("/v1/models").json()["data"]][1:]


@pytest.mark.parametrize("path", ["all.safetensors", "peft/extra", "trusted/extra"])
def test_a_role_comes_and_goes(http: httpx.Client, roles: Path, path: str) -> None:
    assert http.post("/v1/chat/completions", json={"model": "extra", "messages": QUESTION}).status_code == 404
    for given in (path, str(roles / path)):
        answer = http.post(LOAD, json={"lora_name": "extra", "lora_path": given})
        assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'extra' added successfully.")
        assert served(http) == ["plan", "action", "extra"]
        card = http.get("/v1/models/extra").json()
        assert card["root"] == str(roles / path)
        assert text(say(http, "extra")) != text(say(http, "plan"))
        again = http.post(LOAD, json={"lora_name": "extra", "lora_path": given})
        assert again.status_code == 400
        assert "loaded already" in again.json()["error"]["message"]
        gone = http.post(UNLOAD, json={"lora_name": "extra"})
        assert (gone.status_code, gone.text) == (200, "Success: LoRA adapter 'extra' removed successfully.")
        assert served(http) == ["plan", "action"]
    twice = http.post(UNLOAD, json={"lora_name": "extra"})
    assert twice.status_code == 404
    assert twice.json()["error"]["param"] == "lora_name"


def test_the_same_prompt_as_a_then_b_then_base_and_after_other_weights(http: httpx.Client) -> None:
    """Cold and warm answers are the same, and new weights under an old name hit nothing that the old ones wrote."""
    cold = {role: text(say(http, role, cache_salt=role)) for role in ("plan", "action", "base")}
    assert len(set(cold.values())) == 3
    for role in ("plan", "action", "base"):
        say(http, role)
    warm = say(http, "plan")
    assert warm["usage"]["lragent"]["base_reused"] == warm["usage"]["prompt_tokens"] - 1
    body = {"lora_name": "plan", "lora_path": "other.safetensors", "load_inplace": True}
    assert http.post(LOAD, json=body).status_code == 200
    assert sorted(served(http)) == ["action", "plan"]
    fresh = say(http, "plan", cache_salt="fresh")
    reloaded = say(http, "plan", cache_salt="plan")
    assert text(reloaded) == text(fresh) != cold["plan"]
    back = {"lora_name": "plan", "lora_path": "all.safetensors", "load_inplace": True}
    assert http.post(LOAD, json=back).status_code == 200
    found = say(http, "plan", cache_salt="plan")
    assert text(found) == cold["plan"]
    assert found["usage"]["lragent"]["base_reused"] == found["usage"]["prompt_tokens"] - 1


def test_unloading_while_it_streams(http: httpx.Client, service: EngineService) -> None:
    http.post(LOAD, json={"lora_name": "extra", "lora_path": "all.safetensors"})
    whole = text(say(http, "extra", max_tokens=200, cache_salt="alone"))
    body = {"model": "extra", "messages": QUESTION, "max_tokens": 200, "temperature": 0, "ignore_eos": True}
    with http.stream("POST", "/v1/chat/completions", json=body | {"stream": True, "n": 2}) as answer:
        lines = answer.iter_lines()
        next(lines)
        assert http.post(UNLOAD, json={"lora_name": "extra"}).status_code == 200
        assert http.post("/v1/chat/completions", json=body).status_code == 404
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    said = ["", ""]
    for line in rest[:-1]:
        for choice in json.loads(line[6:])["choices"]:
            said[choice["index"]] += choice["delta"].get("content", "")
    assert said == [whole, whole]
    assert len(service._engine.roles.role_of) == 3
    assert service.ask(lambda engine: engine.cache.base_pool.used_count - engine.cache.base_tree.size).result() == 0


def test_a_wrong_role_is_refused_and_nothing_changes(http: httpx.Client, roles: Path, adapters: AdapterSet) -> None:
    def written(name: str, made: AdapterSet) -> str:
        write_pack(roles / name, made)
        return name

    base = adapters.base_fingerprint
    other_a = dataclasses.replace(make_adapter_set(tiny_model(), ("extra",), seed=9), base_fingerprint=base)
    wide = dataclasses.replace(make_adapter_set(tiny_model(), ("extra",), rank=16), base_fingerprint=base)
    nothing = dataclasses.replace(
        make_adapter_set(tiny_model(), ("extra",), targets=("o_proj",)), base_fingerprint=base
    )
    foreign = dataclasses.replace(adapters, base_fingerprint="f" * 64)
    good = (roles / "all.safetensors").read_bytes()
    (roles / "short.safetensors").write_bytes(good[:-100])
    (roles / "flipped.safetensors").write_bytes(good[:-7] + bytes([good[-7] ^ 1]) + good[-6:])
    (roles / "pickle.bin").write_bytes(b"\x80\x04\x95abc")
    safetensors.torch.save_file({"a": torch.zeros(2)}, roles / "foreign.safetensors")
    before = text(say(http, "plan"))
    for path, said in (
        (written("other_a.safetensors", other_a), "its A is not the one"),
        (written("wide.safetensors", wide), "rank"),
        (written("nothing.safetensors", nothing), "o_proj"),
        (written("base.safetensors", foreign), "another base"),
        ("short.safetensors", "short.safetensors"),
        ("flipped.safetensors", "flipped.safetensors"),
        ("pickle.bin", "pickle.bin"),
        ("foreign.safetensors", "foreign.safetensors"),
        ("team.safetensors", "no role 'extra'"),
    ):
        answer = http.post(LOAD, json={"lora_name": "extra", "lora_path": path})
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert error["param"] == "lora_path"
        assert said in error["message"]
        assert "\n" not in error["message"]
        in_place = http.post(LOAD, json={"lora_name": "plan", "lora_path": path, "load_inplace": True})
        assert in_place.status_code == (200 if path == "team.safetensors" else 400), in_place.text
    assert served(http) in (["plan", "action"], ["action", "plan"])
    assert text(say(http, "plan", cache_salt="again")) == before
    assert http.post("/v1/chat/completions", json={"model": "extra", "messages": QUESTION}).status_code == 404


def test_only_regular_files_inside_the_folder(http: httpx.Client, roles: Path, place: Path) -> None:
    (roles / "link.safetensors").symlink_to(place / "outside.safetensors")
    (roles / "linked").symlink_to(place)
    (roles / "inside.safetensors").symlink_to(roles / "all.safetensors")
    (roles / "empty").mkdir()
    os.mkfifo(roles / "fifo")
    sly = roles / "sly"
    sly.mkdir()
    (sly / CONFIG).symlink_to(roles / "peft" / "extra" / CONFIG)
    os.mkfifo(sly / WEIGHTS)
    for path, status in (
        ("../outside.safetensors", 400), ("link.safetensors", 400), ("linked/outside.safetensors", 400),
        (str(place / "outside.safetensors"), 400), ("/etc/passwd", 400), ("fifo", 400), ("sly", 400), ("empty", 400),
        (".", 400), ("", 400), ("https://example.com/x", 400), ("file:///etc/passwd", 400), ("a\0b", 400),
        ("missing.safetensors", 404), ("x" * 500, 404), ("../" * 40, 400),
    ):  # fmt: skip
        done: list[httpx.Response] = []
        asked = threading.Thread(
            target=lambda path=path, done=done: done.append(
                http.post(LOAD, json={"lora_name": "extra", "lora_path": path})
            )
        )
        asked.start()
        asked.join(10)
        assert done, f"{path!r} hangs"
        assert done[0].status_code == status, (path, done[0].text)
        assert "passwd:" not in done[0].text
    assert http.post(LOAD, json={"lora_name": "extra", "lora_path": "inside.safetensors"}).status_code == 200


@pytest.mark.parametrize("name", ["base", "", "a/b", "..", "x" * 100, 7, None])
def test_names_that_no_role_can_have(http: httpx.Client, name: Any) -> None:
    answer = http.post(LOAD, json={"lora_name": name, "lora_path": "all.safetensors"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "lora_name"


def test_places_are_bounded(http: httpx.Client, roles: Path, adapters: AdapterSet) -> None:
    for at in range(2):
        renamed = only(adapters, "extra")
        renamed = dataclasses.replace(renamed, roles=(dataclasses.replace(renamed.roles[0], name=f"r{at}"),))
        write_pack(roles / f"r{at}.safetensors", renamed)
        assert http.post(LOAD, json={"lora_name": f"r{at}", "lora_path": f"r{at}.safetensors"}).status_code == 200
    full = http.post(LOAD, json={"lora_name": "extra", "lora_path": "all.safetensors"})
    assert full.status_code == 429
    assert "All 4 places" in full.json()["error"]["message"]
    assert http.post(UNLOAD, json={"lora_name": "r0"}).status_code == 200
    assert http.post(LOAD, json={"lora_name": "extra", "lora_path": "all.safetensors"}).status_code == 200


def test_under_traffic_nobody_waits_or_breaks(http: httpx.Client, service: EngineService) -> None:
    """Streams run while roles are replaced again and again; every answer is one of the two that there can be."""
    want = {text(say(http, "plan", max_tokens=30))}
    http.post(LOAD, json={"lora_name": "plan", "lora_path": "other.safetensors", "load_inplace": True})
    want.add(text(say(http, "plan", max_tokens=30)))
    got: list[str] = []
    stop = threading.Event()

    def talk(at: int) -> None:
        with httpx.Client(base_url=http.base_url, timeout=60, trust_env=False) as mine:
            while not stop.is_set():
                got.append(text(say(mine, "plan", max_tokens=30, cache_salt=f"{at}")))

    threads = [threading.Thread(target=talk, args=(at,)) for at in range(3)]
    for thread in threads:
        thread.start()
    loaded = 0
    for at in range(1000):
        path = ("all.safetensors", "other.safetensors")[at % 2]
        answer = http.post(LOAD, json={"lora_name": "plan", "lora_path": path, "load_inplace": True})
        assert answer.status_code in (200, 429), answer.text
        loaded += answer.is_success
        if len(got) > 12 and loaded > 12:
            break
    stop.set()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert loaded > 12
    assert set(got) == want
    wait_until(lambda: not service.stats().running)
    assert len(service._engine.roles.role_of) == 3


def test_not_unless_it_is_allowed() -> None:
    with live_server(FakeService()) as url, httpx.Client(base_url=url, trust_env=False) as client:
        for path in (LOAD, UNLOAD):
            answer = client.post(path, json={"lora_name": "plan", "lora_path": "x"})
            assert answer.status_code == 403
            assert "--roles-folder" in answer.json()["error"]["message"]
