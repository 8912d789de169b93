"""Users for Locust: teams of agents that talk, stream, leave early, ask nonsense, and have their roles reloaded.

    locust -f bench/load.py --headless --users 16 --spawn-rate 4 --run-time 5m --host http://127.0.0.1:8000

A request counts as failed unless it gets the answer that it must get, be that a refusal. The server needs roles plan,
action and reflect. $LRAGENT_LOAD_PACKS: two packs of such roles that differ, in the server's folder of roles, with a
comma between them; without it no role is reloaded. $LRAGENT_API_KEY: the key that is sent.
"""

from __future__ import annotations

import json
import os
import random
import string
from typing import Any

from locust import FastHttpUser, between, task

ROLES = ("plan", "action", "reflect", "base")
PACKS = [name for name in os.environ.get("LRAGENT_LOAD_PACKS", "").split(",") if name]
KEY = os.environ.get("LRAGENT_API_KEY", "").split(",")[0].rpartition("=")[2]
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["search", "lookup"]}, "page": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["kind", "page"],
    "additionalProperties": False,
}
LONGEST = 24
"""Messages of a conversation before it begins anew."""


def words(count: int) -> str:
    """So many made-up words."""
    return " ".join("".join(random.choices(string.ascii_lowercase, k=random.randint(2, 9))) for _ in range(count))


NONSENSE: tuple[tuple[str, Any, tuple[int, ...]], ...] = (
    ("/v1/chat/completions", {"model": "plan"}, (400,)),
    ("/v1/chat/completions", {"model": "nobody", "messages": [{"role": "user", "content": "a"}]}, (404,)),
    ("/v1/chat/completions", {"model": "plan", "messages": [{"role": "wizard", "content": "a"}]}, (400,)),
    ("/v1/chat/completions", {"model": "plan", "messages": [{"role": "user", "content": "a"}], "n": 999}, (400,)),
    ("/v1/completions", {"model": "plan", "prompt": [-1, 10**9]}, (400,)),
    ("/v1/completions", {"model": "plan", "prompt": "a", "temperature": 1e9}, (400,)),
    ("/v1/completions", {"model": "plan", "prompt": "a", "logit_bias": {"x": "y"}}, (400,)),
    ("/v1/completions", {"model": "plan", "prompt": "a", "structured_outputs": {"regex": "(a"}}, (400,)),
    ("/v1/completions", {"model": "plan", "prompt": "word " * 20_000}, (400,)),
    ("/v1/load_lora_adapter", {"lora_name": "spare", "lora_path": "../outside"}, (400, 403, 404)),
    ("/v1/unload_lora_adapter", {"lora_name": "nobody"}, (403, 404)),
)
BROKEN = (b"", b"{", b"[1]", b"\xff\xfe", b'{"a":' * 100 + b"1" + b"}" * 100, b'{"model": "\\ud800"}', b"null")


class Team(FastHttpUser):
    """One conversation of several roles, and what else its client does."""

    wait_time = between(0.0, 0.05)
    connection_timeout = 60.0
    network_timeout = 60.0

    def on_start(self) -> None:
        """A conversation and a tenant of its own."""
        self.headers = {"Authorization": f"Bearer {KEY}"} if KEY else {}
        self.begin()

    def begin(self) -> None:
        """Forget what was said."""
        self.messages: list[dict[str, Any]] = [{"role": "system", "content": "You are one of a team."}]
        self.messages.append({"role": "user", "content": words(random.randint(3, 60))})
        self.salt = random.choice(["", "", "tenant-a", "tenant-b"])
        self.trajectory = f"t-{random.getrandbits(40):x}"

    def asked(self, **more: Any) -> dict[str, Any]:
        """The body that asks for the next turn."""
        return {
            "model": random.choice(ROLES),
            "messages": self.messages,
            "max_tokens": random.randint(1, 24),
            "temperature": random.choice([0.0, 0.0, 0.7, 1.5]),
            "cache_salt": self.salt,
            "trajectory_id": self.trajectory,
        } | more

    def said(self, role: str, text: str) -> None:
        """The conversation goes on, sometimes with a tool's output."""
        own = {} if role == "base" else {"name": role}
        self.messages.append({"role": "assistant", "content": text} | own)
        if random.random() < 0.4:
            self.messages.append({"role": "tool", "content": words(random.randint(1, 80))})
        if len(self.messages) > LONGEST:
            self.begin()

    @task(30)
    def turn(self) -> None:
        """A turn, whole."""
        body = self.asked()
        with self.client.post(
            "/v1/chat/completions", json=body, headers=self.headers, catch_response=True, name="chat"
        ) as answer:
            if answer.status_code == 200:
                choice = answer.json()["choices"][0]
                usage = answer.json()["usage"]
                own = usage["lragent"]
                if own["tokens_computed"] + own["base_reused"] - own["lr_prefilled"] != usage["prompt_tokens"]:
                    answer.failure(f"usage does not add up: {usage}")
                self.said(body["model"], choice["message"]["content"])
            elif answer.status_code == 400 and b"context_length_exceeded" in answer.content:
                answer.success()
                self.begin()

    @task(20)
    def streamed_turn(self) -> None:
        """A turn as it comes, to its end."""
        body = self.asked(stream=True, stream_options={"include_usage": True})
        with self.client.post(
            "/v1/chat/completions", json=body, headers=self.headers, catch_response=True, name="chat, streamed"
        ) as answer:
            if answer.status_code == 400 and b"context_length_exceeded" in answer.content:
                answer.success()
                self.begin()
                return
            if answer.status_code != 200:
                return
            events = [line for line in answer.text.split("\n\n") if line]
            if events[-1] != "data: [DONE]":
                answer.failure(f"the stream broke off: {events[-1][:200]}")
                return
            chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
            if chunks[-1]["choices"] or not chunks[-1]["usage"]:
                answer.failure("the usage is not the last event")
            self.said(body["model"], "".join(c["choices"][0]["delta"].get("content", "") for c in chunks[:-1]))

    @task(8)
    def leaves_early(self) -> None:
        """Reads a little of a long stream and goes."""
        body = self.asked(stream=True, max_tokens=400, ignore_eos=True)
        with self.client.post(
            "/v1/chat/completions",
            json=body,
            headers=self.headers,
            catch_response=True,
            stream=True,
            name="leaves early",
        ) as answer:
            if answer.status_code == 200:
                for _ in range(random.randint(0, 5)):
                    answer.stream.read(64)
                answer.success()
            elif answer.status_code == 400:
                answer.success()
                self.begin()

    @task(6)
    def choices(self) -> None:
        """Several answers, with log-probabilities."""
        body = {"model": random.choice(ROLES), "prompt": words(8), "n": 3, "max_tokens": 6, "logprobs": 2, "seed": 1}
        with self.client.post(
            "/v1/completions", json=body, headers=self.headers, catch_response=True, name="choices"
        ) as answer:
            if answer.status_code == 200 and len(answer.json()["choices"]) != 3:
                answer.failure("three answers were asked for")

    @task(5)
    def structured(self) -> None:
        """An answer that must be an object."""
        body = self.asked(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}})
        body |= {"max_tokens": 200, "messages": self.messages[:2]}
        with self.client.post(
            "/v1/chat/completions", json=body, headers=self.headers, catch_response=True, name="structured"
        ) as answer:
            if answer.status_code == 200:
                choice = answer.json()["choices"][0]
                if choice["finish_reason"] == "stop" and set(json.loads(choice["message"]["content"])) != {
                    "kind",
                    "page",
                }:
                    answer.failure(f"not what the schema says: {choice}")

    @task(8)
    def nonsense(self) -> None:
        """A well-formed body that must be refused."""
        path, body, statuses = random.choice(NONSENSE)
        with self.client.post(path, json=body, headers=self.headers, catch_response=True, name="nonsense") as answer:
            if answer.status_code in statuses and "error" in answer.json():
                answer.success()
            else:
                answer.failure(f"{path} {str(body)[:80]}: {answer.status_code}")

    @task(4)
    def broken(self) -> None:
        """A body that is no JSON object."""
        headers = self.headers | {"Content-Type": "application/json"}
        with self.client.post(
            "/v1/chat/completions", data=random.choice(BROKEN), headers=headers, catch_response=True, name="broken"
        ) as answer:
            answer.success() if answer.status_code == 400 else answer.failure(f"{answer.status_code}")

    @task(4)
    def looks(self) -> None:
        """What dashboards and the page ask for."""
        for path in ("/health", "/metrics", "/v1/models", "/page/state.json"):
            self.client.get(path, headers=self.headers, name=path)

    @task(2)
    def reloads(self) -> None:
        """Other weights under a role's name, while its requests run; or a role that comes and goes."""
        if not PACKS:
            return
        if random.random() < 0.6:
            body = {"lora_name": random.choice(ROLES[:3]), "lora_path": random.choice(PACKS), "load_inplace": True}
            path = "/v1/load_lora_adapter"
            statuses: tuple[int, ...] = (200, 429)
        elif random.random() < 0.5:
            body, path = {"lora_name": "extra", "lora_path": PACKS[0]}, "/v1/load_lora_adapter"
            statuses = (200, 400, 429)
        else:
            body, path, statuses = {"lora_name": "extra"}, "/v1/unload_lora_adapter", (200, 404)
        with self.client.post(path, json=body, headers=self.headers, catch_response=True, name="reload") as answer:
            if answer.status_code in statuses:
                answer.success()
            else:
                answer.failure(f"{path}: {answer.status_code} {answer.text[:200]}")
