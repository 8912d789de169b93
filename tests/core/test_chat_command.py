"""`lragent chat` against a server that speaks OpenAI's API and repeats what it hears."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from lragent.cli import main as cli
from lragent.cli.chat_lines import offers

ROLES = ("plan", "action")


class Fake(ThreadingHTTPServer):
    """Serves base, plan and action. A role answers with the number of messages and the last one's text."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.wanted_key: str | None = None
        self.left = threading.Event()
        """Set when a client went while it was being answered."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Fake

    def log_message(self, *_: object) -> None:
        """Says nothing."""

    def do_GET(self) -> None:
        if self._refused():
            return
        cards = [{"id": "tiny", "parent": None}, *({"id": role, "parent": "tiny"} for role in ROLES)]
        cards = [card | {"object": "model", "created": 0, "owned_by": "lragent"} for card in cards]
        if self.path == "/v1/models":
            self._json(200, {"object": "list", "data": cards})
        elif self.path == "/v1/models/base":
            self._json(200, cards[0])
        elif self.path.startswith("/v1/models/"):
            self._error(404, "model: 'nobody' is not served here; choose one of base, plan, action.", "model_not_found")
        else:
            self._error(404, f"GET {self.path}: there is no such path here.", "unknown_path")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self._refused():
            return
        self.server.asked.append(body)
        last = body["messages"][-1]["content"]
        if last == "too long":
            self._error(400, "messages: are longer than\nthe context.", "context_length_exceeded")
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        role = body["model"]
        self._chunk({"role": "assistant", "content": ""} | ({"name": role} if role in ROLES else {}))
        if last == "say nothing yet":
            self._wait_until_the_client_goes()
            return
        self._chunk({"content": f"{len(body['messages'])} "})
        if last == "slowly":
            self._wait_until_the_client_goes()
        elif last == "fail":
            self._event({"error": {"message": "The server failed on this request.", "code": "internal_error"}})
        else:
            self._chunk({"content": last})
            self._event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
            self._event({"choices": [], "usage": usage(len(body["messages"]))})
            self.wfile.write(b"data: [DONE]\n\n")

    def _wait_until_the_client_goes(self) -> None:
        select.select([self.connection], [], [], 10)
        self.server.left.set()

    def _refused(self) -> bool:
        key = self.headers["Authorization"]
        self.server.keys.append(key)
        if self.server.wanted_key is None or key == f"Bearer {self.server.wanted_key}":
            return False
        self._error(401, "no.", None)
        return True

    def _chunk(self, delta: dict[str, Any]) -> None:
        self._event({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})

    def _event(self, data: dict[str, Any]) -> None:
        head = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "m"}
        self.wfile.write(f"data: {json.dumps((head if 'error' not in data else {}) | data)}\n\n".encode())
        self.wfile.flush()

    def _error(self, status: int, message: str, code: str | None) -> None:
        self._json(status, {"error": {"message": message, "type": "x", "param": None, "code": code}})

    def _json(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def usage(messages: int) -> dict[str, Any]:
    ours = {"tokens_computed": messages, "base_reused": 1200, "lr_reused": 1200, "lr_prefilled": 0}
    counts = {"prompt_tokens": 1200 + messages, "completion_tokens": 2, "total_tokens": 1202 + messages}
    return counts | {"prompt_tokens_details": {"cached_tokens": 1200}, "lragent": ours}


@pytest.fixture
def fake() -> Iterator[Fake]:
    server = Fake()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def piped(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs the command over lines from a pipe: exit status, stdout, stderr."""
    for name in ("LRAGENT_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)

    def run(lines: list[str], *words: str) -> tuple[int, str, str]:
        source, sink = os.pipe()
        os.write(sink, "".join(f"{line}\n" for line in lines).encode())
        os.close(sink)
        with open(source, encoding="utf-8") as stdin:
            monkeypatch.setattr(sys, "stdin", stdin)
            status = cli.main(["chat", "--base-url", fake.url, *words])
        return status, *capsys.readouterr()

    return run


def said(fake: Fake) -> list[tuple[str, str | None, str]]:
    """The conversation as the last request had it: role, name, content."""
    return [(m["role"], m.get("name"), m["content"]) for m in fake.asked[-1]["messages"]]


def test_from_a_pipe_come_answers_alone(fake: Fake, piped: Any) -> None:
    assert piped(["hello", "", "/role action", "you there?"]) == (0, "1 hello\n3 you there?\n", "")
    assert [request["model"] for request in fake.asked] == ["plan", "action"]  # the first role, not the base
    assert said(fake) == [("user", None, "hello"), ("assistant", "plan", "1 hello"), ("user", None, "you there?")]
    assert "max_tokens" not in fake.asked[0]
    assert fake.asked[0]["stream_options"] == {"include_usage": True}


def test_options_go_into_every_request(fake: Fake, piped: Any) -> None:
    words = ["--role", "action", "--system", "Be brief.", "--max-tokens", "5", "--temperature", "0"]
    assert piped(["hello"], *words, "--trajectory-id", "7", "--api-key", "sesame")[0] == 0
    request = fake.asked[0]
    assert (request["model"], request["max_tokens"], request["temperature"]) == ("action", 5, 0)
    assert request["trajectory_id"] == "7"
    assert said(fake)[0] == ("system", None, "Be brief.")
    assert set(fake.keys) == {"Bearer sesame"}


def test_others_speak_tools_answer_and_entries_are_taken_back(fake: Fake, piped: Any) -> None:
    piped(["hello", "/ask action", "/tool a page", "/ask"], "--system", "S")
    turns = [
        ("system", None, "S"),
        ("user", None, "hello"),
        ("assistant", "plan", "2 hello"),
        ("assistant", "action", "3 2 hello"),
        ("tool", None, "a page"),
    ]
    assert said(fake) == turns
    assert fake.asked[-1]["model"] == "plan"

    piped(["hello", "/ask action", "/tool a page", "/undo", "/undo", "//undo"], "--system", "S")
    assert said(fake) == [*turns[:3], ("user", None, "/undo")]

    piped(["hello", "/new", "again"], "--system", "S")
    assert said(fake) == [("system", None, "S"), ("user", None, "again")]


def test_a_name_that_is_served_but_not_listed(fake: Fake, piped: Any) -> None:
    assert piped(["/role base", "hello", "/role plan", "and?"])[0] == 0
    assert [request["model"] for request in fake.asked] == ["base", "plan"]
    assert said(fake)[1] == ("assistant", None, "1 hello")  # the base has no name


def test_save_writes_one_row_and_no_foreign_file(tmp_path: Path, piped: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.jsonl").write_text("precious")
    lines = ["/save talk.jsonl", "hallö", "/save talk.jsonl", "/save mine.jsonl", "more", "/save talk.jsonl", "/save"]
    status, _, err = piped(lines)
    assert status == 2
    assert [line.split(";")[0] for line in err.splitlines()] == [
        "error: there is nothing to save yet.",
        "error: mine.jsonl is there already",
        "error: /save takes the name of a file.",
    ]
    (row,) = (tmp_path / "talk.jsonl").read_text(encoding="utf-8").splitlines()
    assert "hallö" in row
    assert [message["role"] for message in json.loads(row)["messages"]] == ["user", "assistant"] * 2
    assert (tmp_path / "mine.jsonl").read_text() == "precious"

    from lragent.trajectories import read_row

    read_row(json.loads(row), ROLES, source="talk")
    assert "no/such/x" in piped(["hello", "/save no/such/x"])[2]


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("too long", "messages: are longer than the context."),
        ("fail", "The server failed on this request."),
        ("/role nobody", "model: 'nobody' is not served here; choose one of base, plan, action."),
        ("/ask nobody", "model: 'nobody' is not served here; choose one of base, plan, action."),
        ("/role", "/role takes the name of a role; /roles lists them."),
        ("/dance", "there is no command /dance; /help lists them."),
        ("/ask", "there is nothing to answer yet; write a message first."),
        ("/undo", "there is nothing to take back."),
        ("/tool", "/tool takes the text that a tool gave."),
    ],
)
def test_what_fails_is_one_line_and_leaves_the_conversation(fake: Fake, piped: Any, line: str, error: str) -> None:
    status, out, err = piped([line, "hello"])
    assert (status, err) == (2, f"error: {error}\n")
    assert out.splitlines()[-1] == "1 hello"
    assert said(fake) == [("user", None, "hello")]


def test_roles_help_and_quit(fake: Fake, piped: Any) -> None:
    assert piped(["/roles", "/quit", "hello"]) == (0, "tiny\nplan\naction\n", "")
    assert fake.asked == []
    assert "/undo" in piped(["/help"])[1]


def test_keys(fake: Fake, piped: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.wanted_key = "sesame"
    status, out, err = piped(["hello"])
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")
    assert "--api-key or LRAGENT_API_KEY" in err
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    assert piped(["hello"])[0] == 0
    monkeypatch.setenv("LRAGENT_API_KEY", "another")
    assert piped(["hello"])[0] == 2


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--role", "nobody"], "'nobody' is not served here"),
        (["--base-url", "http://127.0.0.1:1/v1"], "start one with `lragent serve`"),
        (["--base-url", "127.0.0.1:8000"], "--base-url: '127.0.0.1:8000' is not the address of a server"),
        (["--base-url", "http://"], "is not the address of a server"),
        (["--base-url", "http://a:b/v1"], "is not the address of a server"),
    ],
)
def test_a_start_that_fails_is_one_sentence(piped: Any, words: list[str], error: str) -> None:
    status, out, err = piped(["hello"], *words)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert error in err


def test_an_address_without_v1(fake: Fake, piped: Any) -> None:
    assert "mostly end in /v1" in piped([], "--base-url", fake.url.removesuffix("/v1"))[2]


def test_without_the_openai_package(piped: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert piped([]) == (
        2,
        "",
        "error: chat talks by the package openai, which is not installed: pip install 'lragent[eval]'\n",
    )


def test_what_tab_offers() -> None:
    assert offers("", "/ro", list(ROLES)) == ["/role ", "/roles "]
    assert offers("", "pl", list(ROLES)) == []
    assert offers("/role ", "", list(ROLES)) == ["plan ", "action "]
    assert offers("/ask ", "a", list(ROLES)) == ["action "]
    assert offers("/tool ", "a", list(ROLES)) == []


class Terminal:
    """The command in a terminal of its own."""

    def __init__(self, *words: str) -> None:
        self._ours, theirs = pty.openpty()
        command = [sys.executable, "-m", "lragent.cli.main", "chat", *words]
        env = os.environ | {"TERM": "dumb", "COLUMNS": "120"}
        self.process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=env)
        os.close(theirs)
        self._seen = ""

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def until(self, text: str) -> str:
        """What came up to and with `text`, which must come soon."""
        deadline = time.monotonic() + 20
        while text not in self._seen:
            ready, _, _ = select.select([self._ours], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"waited for {text!r}: {self._seen!r}"
            self._seen += os.read(self._ours, 4096).decode()
        before, _, self._seen = self._seen.partition(text)
        return before + text

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)


def test_in_a_terminal(fake: Fake) -> None:
    terminal = Terminal("--base-url", fake.url)
    try:
        terminal.until("plan answers · /help lists the commands")
        terminal.until("plan> ")
        terminal.type("hello \\x1b[2J\n".replace("\\x1b", "\x16\x1b"))  # Ctrl-V types an escape as it is
        terminal.until("1 hello [2J")
        terminal.until("plan · 1 tokens computed, 1,200 reused · 0.0")
        terminal.type("/ro")
        terminal.type("le a\t\n")
        terminal.until("action answers from now on")
        terminal.until("action> ")

        terminal.type("slowly\n")
        terminal.until("3 ")
        terminal.process.send_signal(signal.SIGINT)
        terminal.until("action · stopped · 0.")
        assert fake.left.wait(5)
        terminal.until("action> ")
        terminal.type("say nothing yet\n")
        wait_for(lambda: len(fake.asked) == 3)
        terminal.process.send_signal(signal.SIGINT)
        terminal.until("stopped before the first token")
        terminal.until("action> ")

        terminal.type("half a li")
        terminal.until("half a li")
        terminal.process.send_signal(signal.SIGINT)
        terminal.until("action> ")
        terminal.type("too long\n")
        terminal.until("error: messages: are longer than the context.")
        terminal.until("action> ")
        terminal.type("/undo\n/undo\nwell\n")
        terminal.until("3 well")
        terminal.until("action> ")
        terminal.type("\x04")
        assert terminal.process.wait(10) == 0
    finally:
        terminal.close()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
