"""A small server that shows the page with made-up data, so that its tests need no engine.

`Scene` is what the page is told; a test changes it while the page polls. Requests are kept, for a test to look at.
"""

from __future__ import annotations

import copy
import json
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[3] / "serve" / "api" / "page"
CSP = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:"
TYPES = {".html": "text/html; charset=utf-8", ".css": "text/css", ".js": "text/javascript"}
MODEL = "SmolLM2-135M-Instruct"


def role(name: str, requests: int, prompt: int, computed: int, generated: int, running: int = 0) -> dict[str, Any]:
    reused = prompt - computed
    return {
        "name": name,
        "parent": None if name == "base" else MODEL,
        "digest": None if name == "base" else f"{name.encode().hex():0<16}"[:16],
        "requests": requests,
        "running": running,
        "prompt_tokens": prompt,
        "tokens_computed": computed,
        "base_reused": reused,
        "lr_reused": reused,
        "generated": generated,
    }


def node(id: int, parent: int | None, start: int, writers: list[list[Any]], readers: list[str], **more: Any) -> dict:
    length = sum(tokens for _, tokens in writers)
    shape = {"id": id, "parent": parent, "part": "base", "owner": "all roles", "start": start, "length": length}
    return {**shape, "writers": writers, "readers": readers, "held": 0, "idle_s": 3.2, **more}


def nodes() -> list[dict[str, Any]]:
    """A shared prompt, from which three trajectories go on."""
    return [
        node(1, None, 0, [["base", 210]], ["plan", "action", "reflect"], held=1),
        node(2, 1, 210, [["plan", 64], ["action", 90], ["reflect", 60]], ["plan", "action", "reflect"], held=1),
        node(3, 2, 424, [["plan", 48], ["action", 120]], ["action", "plan"], held=1, idle_s=0.1),
        node(4, 2, 424, [["reflect", 32]], ["reflect"], idle_s=48.0),
        node(5, 1, 210, [["plan", 160], ["action", 110]], ["plan", "action"], idle_s=71.5),
        node(6, None, 0, [["base", 120], ["plan", 75]], ["plan"], idle_s=132.0),
    ]


def many_nodes(number: int) -> list[dict[str, Any]]:
    """A random forest of `number` nodes, a parent always before its children."""
    random_ = random.Random(0)
    made = [node(1, None, 0, [["base", 100]], ["plan", "action"])]
    while len(made) < number:
        parent = random_.choice(made[-40:])
        writers = [[random_.choice(["plan", "action", "reflect"]), random_.randint(1, 60)] for _ in range(2)]
        made.append(node(len(made) + 1, parent["id"], parent["start"] + parent["length"], writers, ["plan"]))
    return made


def group(name: str, requests: int, cost: float) -> dict[str, Any]:
    tokens = {"tokens_computed": 340 * requests, "base_reused": 910 * requests, "lr_reused": 910 * requests}
    rest = {"generated": 60 * requests, "tool_tokens": 25 * requests, "kv_byte_seconds": 31_000_000.0 * requests}
    return {"name": name, "requests": requests, **tokens, **rest, "cost": cost}


def ledger() -> dict[str, Any]:
    return {
        "unit": "USD",
        "rows": 29,
        "cost": 0.0123,
        "fresh": {},
        "groups": {
            "role": [group("plan", 12, 0.0061), group("action", 11, 0.0043), group("reflect", 6, 0.0019)],
            "key": [group("team-research", 20, 0.009), group("team-support", 9, 0.0033)],
            "trajectory": [group("page-17-4", 5, 0.0021), group("", 24, 0.0102)],
        },
        "budgets": [
            {"scope": "role", "name": "plan", "limit": 1.0, "spent": 0.2, "reserved": 0.05, "left": 0.75},
            {"scope": "key", "name": "team-support", "limit": 0.5, "spent": 0.48, "reserved": 0.0, "left": 0.02},
        ],
    }


def state() -> dict[str, Any]:
    return {
        "model": MODEL,
        "sharing": "base_lr_shared",
        "prefix_writer": "base",
        "version": "0.1.0",
        "uptime_s": 4523.3,
        "max_model_len": 2048,
        "device": "cpu",
        "alive": True,
        "roles": [
            role("base", 3, 500, 120, 96),
            role("plan", 12, 9_310, 2_140, 410, running=1),
            role("action", 11, 10_200, 1_275, 388),
            role("reflect", 6, 5_120, 384, 201),
        ],
        "totals": {
            "requests": 32,
            "running": 1,
            "waiting": 2,
            "preempted": 0,
            "prompt_tokens": 25_130,
            "tokens_computed": 3_919,
            "base_reused": 21_211,
            "lr_reused": 21_211,
            "lr_prefilled": 0,
            "generated": 1_095,
        },
        "ttft_ms": {"count": 32, "p50": 12.0, "p95": 30.1},
        "inter_token_ms": {"count": 1000, "p50": 6.0, "p95": 8.04},
        "cache": {
            "slots_total": 8192,
            "slots_used": 1089,
            "slots_cached": 497,
            "base_bytes_used": 25_088_000,
            "base_bytes_total": 188_743_680,
            "lr_bytes_used": 1_045_440,
            "lr_bytes_total": 7_864_320,
            "evicted": 0,
            "truncated": False,
            "nodes": nodes(),
        },
        "ledger": ledger(),
    }


@dataclass
class Scene:
    """What the server answers. key: asked for where it is set. hold: a stream waits for it after its first word."""

    state: dict[str, Any] = field(default_factory=state)
    key: str | None = None
    error: tuple[int, str] | None = None
    broken: str | None = None
    """Comes in the middle of the stream."""
    hold: threading.Event | None = None
    answer: str = "I look it up: the bridge opened in 1932."
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    gone: threading.Event = field(default_factory=threading.Event)
    """Set once a client has left a stream before its end."""


@contextmanager
def serve(scene: Scene, port: int = 0) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", port), lambda *given: Handler(scene, *given))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    def __init__(self, scene: Scene, *given: Any) -> None:
        self.scene = scene
        super().__init__(*given)

    def do_GET(self) -> None:
        if self.path == "/page/state.json":
            self.scene.keys.append(self.headers.get("Authorization"))
            if self._refused():
                return
            self._json(200, self.scene.state)
            self._grow()
            return
        path = PAGE / ("index.html" if self.path == "/" else self.path.removeprefix("/page/"))
        if path.parent == PAGE and path.is_file():
            self._send(200, TYPES[path.suffix], path.read_bytes())
        else:
            self._json(404, {"error": {"message": f"There is no {self.path} here."}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self._refused():
            return
        self.scene.requests.append(copy.deepcopy(body))
        if self.scene.error:
            status, message = self.scene.error
            self._json(status, {"error": {"message": message}})
            return
        try:
            self._stream(body)
        except (BrokenPipeError, ConnectionResetError):
            self.scene.gone.set()

    def _refused(self) -> bool:
        if self.scene.key is None or self.headers.get("Authorization") == f"Bearer {self.scene.key}":
            return False
        self._json(401, {"error": {"message": "This server needs an API key."}})
        return True

    def _grow(self) -> None:
        totals = self.scene.state["totals"]
        totals["prompt_tokens"] += 120
        totals["tokens_computed"] += 20
        totals["generated"] += 9

    def _stream(self, body: dict[str, Any]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        self._event({"choices": [{"index": 0, "delta": {"role": "assistant"}}]})
        for index, word in enumerate(self.scene.answer.split(" ")):
            self._event({"choices": [{"index": 0, "delta": {"content": word if index == 0 else f" {word}"}}]})
            if self.scene.broken:
                self._event({"error": {"message": self.scene.broken}})
                return
            while self.scene.hold and not self.scene.hold.wait(0.05):
                self._event({"choices": []})  # writing is how a server notices that its client has gone
        prompt = 40 * len(body["messages"])
        reused = 0 if len(body["messages"]) == 1 else prompt - 17
        self._event(
            {
                "choices": [],
                "usage": {
                    "prompt_tokens": prompt,
                    "completion_tokens": 9,
                    "prompt_tokens_details": {"cached_tokens": reused},
                    "lragent": {
                        "tokens_computed": prompt - reused,
                        "base_reused": reused,
                        "lr_reused": reused,
                        "lr_prefilled": 0,
                    },
                },
            }
        )
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, value: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(value).encode() + b"\n\n")
        self.wfile.flush()

    def _json(self, status: int, value: dict[str, Any]) -> None:
        self._send(status, "application/json", json.dumps(value).encode())

    def _send(self, status: int, kind: str, data: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Security-Policy", CSP)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """The tests' output is for what fails."""
