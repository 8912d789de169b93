"""`lragent eval run`: a pack or an endpoint is asked, goes on where it ended, and never in another team's folder."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tiny import make_adapter_set, save_tiny, tiny_model

from lragent.cli.main import main
from lragent.eval.agent import ROLES
from lragent.eval.answers import read_answers
from lragent.eval.report.recorded import merged
from lragent.eval.world.generate import make_data_set, with_counts
from lragent.eval.world.levels import LEVELS
from lragent.eval.world.testset import dump_test_set
from lragent.pack import write_pack
from lragent.trajectories import parse_row, read_row


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    save_tiny(folder / "tiny")
    for seed, name in enumerate(("team", "rivals")):
        write_pack(folder / f"{name}.safetensors", make_adapter_set(tiny_model(), seed=seed))
    test = make_data_set(with_counts(LEVELS["demo"], 1, 1, 3), seed=0).test
    (folder / "world.json").write_text(dump_test_set(test))
    return folder


@pytest.fixture
def asked(place: Path, tmp_path: Path) -> Any:
    """Runs the command with more words; its folder is `out`."""

    def run(*words: str) -> int:
        plain = ["--world", str(place / "world.json"), "-o", str(tmp_path / "out"), "--iterations", "2"]
        return main(["eval", "run", *plain, "--workers", "2", *words])

    return run


def by_pack(place: Path, name: str = "team") -> list[str]:
    model = ["--model", str(place / "tiny"), "--max-tokens-in-cache", "4000"]
    return ["--roles", str(place / f"{name}.safetensors"), *model]


def test_a_pack_is_asked_in_modes_and_gone_on_with(
    place: Path, tmp_path: Path, asked: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = ["--modes", "non_shared,full_shared"]
    assert asked(*by_pack(place), *modes, "--questions", "2") == 0
    out = capsys.readouterr().out
    assert "questions that all were asked: 2" in out
    assert "full_shared" in out
    files = [tmp_path / "out" / f"{mode}.jsonl" for mode in ("non_shared", "full_shared")]
    before = [file.read_bytes() for file in files]
    with files[0].open("ab") as file:
        file.write(b'{"id": "test-2", "ki')  # its machine was switched off
    assert asked(*by_pack(place), *modes) == 0
    for file, content in zip(files, before, strict=True):
        assert file.read_bytes().startswith(content)
        assert set(read_answers(file)) == {"test-0", "test-1", "test-2"}
    from lragent.eval import ask

    monkeypatch.setattr(ask, "Engine", None)  # no engine is needed for what is there
    assert asked(*by_pack(place), *modes) == 0


def test_trajectories_are_kept_as_rows_to_learn_from(place: Path, tmp_path: Path, asked: Any) -> None:
    words = [*by_pack(place), "--modes", "non_shared", "--max-num-batched-tokens", "64", "--trajectories"]
    assert asked(*words, "--questions", "2") == 0
    assert asked(*words) == 0
    rows = (tmp_path / "out" / "trajectories" / "non_shared.jsonl").read_text().splitlines()
    asked_texts = [json.loads(row)["messages"][1]["content"] for row in rows]
    world = json.loads((place / "world.json").read_text())
    assert sorted(asked_texts) == sorted(question["text"] for question in world["questions"])
    for at, row in enumerate(rows):
        assert read_row(parse_row(row, source="row"), ROLES, source=f"row {at}")
    assert len(merged([tmp_path / "out"])) >= 1, "they are no answers, and do not disturb these"


def test_a_question_that_is_missing_in_the_middle_is_asked(place: Path, tmp_path: Path, asked: Any) -> None:
    assert asked(*by_pack(place), "--modes", "non_shared") == 0
    file = tmp_path / "out" / "non_shared.jsonl"
    lines = [line for line in file.read_text().splitlines(keepends=True) if '"test-0"' not in line]
    file.write_text("".join(lines))
    assert asked(*by_pack(place), "--modes", "non_shared", "--questions", "2") == 0
    assert set(read_answers(file)) == {"test-0", "test-1", "test-2"}


def test_another_team_s_or_world_s_folder_is_refused(
    place: Path, tmp_path: Path, asked: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--modes", "non_shared", "--questions", "1"]
    assert asked(*by_pack(place), *words) == 0
    for other, what in (
        (by_pack(place, "rivals"), "of another team"),
        ([*by_pack(place), "--iterations", "3"], "with other --iterations"),
        (["--base-url", "http://127.0.0.1:9/v1"], "of another team"),
    ):
        assert asked(*words, *other) == 2
        assert f"holds answers {what};" in capsys.readouterr().err
    assert asked(*by_pack(place), "--questions", "4") == 2
    assert "from 1 to the world's 3" in capsys.readouterr().err
    another = tmp_path / "another.json"
    another.write_text(dump_test_set(make_data_set(with_counts(LEVELS["demo"], 1, 1, 3), seed=1).test))
    assert asked(*by_pack(place), *words, "--world", str(another)) == 2
    assert "holds answers to another world;" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    assert asked(*by_pack(place), *words, "-o", str(tmp_path / "mine")) == 2
    assert "name a new folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "--roles: give a pack, or --base-url"),
        (["--roles", "none.safetensors"], "--roles: there is no file none.safetensors"),
        (["--roles", "TEAM", "--modes", "all"], "--modes: there is no 'all'"),
        (["--roles", "TEAM", "--modes", "endpoint"], "--modes: there is no 'endpoint'"),
        (["--roles", "TEAM", "--world", "none.json"], "none.json: cannot be read"),
        (["--roles", "TEAM", "--questions", "0"], "--questions: must be from 1 to"),
        (["--roles", "TEAM", "--workers", "0"], "workers: must be at least 1"),
        (["--roles", "TEAM", "--iterations", "0"], "iterations: must be at least 1"),
        (["--roles", "TEAM", "--output", "TEAM"], "is a file; name a folder"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_the_folder_to_the_next(
    words: list[str], says: str, place: Path, tmp_path: Path, asked: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert asked(*(str(place / "team.safetensors") if word == "TEAM" else word for word in words)) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


# -- an endpoint ---------------------------------------------------------------------------------------------------


@contextmanager
def endpoint(*, lacks: str = "", breaks_off: bool = False) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server on this machine whose plan names no tool; gives its address and what it is asked."""
    bodies: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            bodies.append(body)
            if body["model"] == lacks:
                error = {"message": f"The model `{lacks}` does not exist.", "type": "invalid_request_error"}
                self._say(404, "application/json", json.dumps({"error": error}).encode())
                return
            common = {"id": "x", "object": "chat.completion.chunk", "created": 0, "model": body["model"]}
            usage = {"prompt_tokens": 40, "completion_tokens": 2, "total_tokens": 42}
            chunks: list[dict[str, Any]] = [
                common | {"choices": [{"index": 0, "delta": {"content": "Hm."}, "finish_reason": "stop"}]},
                common | {"choices": [], "usage": usage},
            ]
            said = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
            self._say(200, "text/event-stream", said.encode())

        def _say(self, status: int, kind: str, content: bytes) -> None:
            self.send_response(status)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if breaks_off else content)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1", bodies
        finally:
            server.shutdown()


def test_an_endpoint_is_asked_and_gone_on_with(tmp_path: Path, asked: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with endpoint() as (url, bodies):
        assert asked("--base-url", url, "--questions", "2") == 0
        first = len(bodies)
        assert first
        assert {body["model"] for body in bodies} == {"plan"}
        assert asked("--base-url", url) == 0
        assert first < len(bodies) <= 2 * first, "one question more, not three"
    found = read_answers(tmp_path / "out" / "endpoint.jsonl")
    assert set(found) == {"test-0", "test-1", "test-2"}
    assert {(answer.ending, answer.context, answer.right) for answer in found.values()} == {("iterations", 42, False)}
    assert "endpoint" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"lacks": "plan"}, "refuses with status 404 (The model `plan` does not exist.)"),
        ({"breaks_off": True}, "does not answer ("),
    ],
)
def test_an_endpoint_s_faults_are_one_sentence(
    options: dict[str, Any], says: str, asked: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with endpoint(**options) as (url, _):
        assert asked("--base-url", url) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {url}: ")
    assert says in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/v1", "127.0.0.1/v1", "http://[/v1"])
def test_where_nobody_listens_is_said(url: str, asked: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert asked("--base-url", url, "--questions", "1", "--workers", "1") == 2
    assert f"{url}: does not answer" in capsys.readouterr().err
