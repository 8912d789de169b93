"""The process: its port, its one line, its signals, its settings."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from lragent.cli.serve import add_parser, settings_from
from lragent.errors import UserError
from lragent.modes import PrefixWriter, SharingMode
from lragent.serve.api.server import address_of, bind
from lragent.serve.api.settings import ServeSettings

SCRIPT = """
from api_fakes import FakeService
from lragent.serve.api.app import create_app
from lragent.serve.api.server import bind, serve
from lragent.serve.api.settings import ServeSettings

service, settings = FakeService(), ServeSettings(port=0, drain_s=1)
sock = bind(settings.host, settings.port)
serve(create_app(service, settings), service, settings, sock, lambda url: print(url, flush=True))
print("ended in order", flush=True)
"""


@contextmanager
def server_process() -> Iterator[tuple[subprocess.Popen[str], str]]:
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (Path(__file__).parent, Path(__file__).parents[2])))}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_open_requests_end(number: signal.Signals) -> None:
    """A short answer is finished; an endless one is ended with an error event; the process returns 0, quietly."""
    with server_process() as (process, url), httpx.Client(base_url=url, trust_env=False, timeout=10) as http:
        body = {"model": "plan", "stream": True, "max_tokens": 4000}
        short = body | {"prompt": "ENDLESS", "max_tokens": 30}
        endless = body | {"prompt": "ENDLESS"}
        with (
            http.stream("POST", "/v1/completions", json=short) as first,
            http.stream("POST", "/v1/completions", json=endless) as second,
        ):
            process.send_signal(number)
            assert first.read().endswith(b"data: [DONE]\n\n")
            assert b"The server is stopping." in second.read()
        out, err = process.communicate(timeout=10)
        assert process.returncode == 0
        assert out.strip() == "ended in order"
        assert "Traceback" not in err


def test_a_port_in_use_is_said_before_anything_is_loaded() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match=r"port: cannot listen on 127\.0\.0\.1"):
            bind("127.0.0.1", taken.getsockname()[1])


@pytest.mark.parametrize("host", ["no.such.host.invalid", "192.0.2.1"])
def test_a_host_that_is_none_of_ours(host: str) -> None:
    with pytest.raises(UserError, match="host: "):
        bind(host, 0)


def test_it_listens_on_this_machine_only_unless_told() -> None:
    with bind(ServeSettings().host, 0) as sock:
        assert address_of(sock).startswith("http://127.0.0.1:")


def parse(*words: str) -> ServeSettings:
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    return settings_from(parser.parse_args(["serve", *words]))


def test_defaults() -> None:
    assert parse() == ServeSettings()


def test_flags_of_memory_and_steps(tmp_path: Path) -> None:
    words = ("--gpu-memory-utilization", "0.5", "--max-num-batched-tokens", "64", "--check-integrity")
    settings = parse(*words)
    assert settings.gpu_memory_utilization == 0.5
    assert settings.max_num_batched_tokens == 64
    assert settings.check_integrity
    file = tmp_path / "serve.yaml"
    file.write_text("check_integrity: true\n")
    assert parse("--config", str(file)).check_integrity, "a flag that is not given changed what the file says"


def test_flags_go_over_overrides_go_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("port: 1\nseed: 1\nhost: localhost\nsharing: full_shared\n")
    settings = parse("--config", str(file), "--port", "3", "--prefix-writer", "base", "port=2", "seed=2")
    assert (settings.port, settings.seed, settings.host) == (3, 2, "localhost")
    assert settings.sharing is SharingMode.FULL_SHARED
    assert settings.prefix_writer is PrefixWriter.BASE


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--port", "70000"], "port: must be between 0 and 65535"),
        (["--max-num-seqs", "0"], "max_num_seqs: must be at least 1"),
        (["--max-model-len", "-5"], "max_model_len: must be at least 2"),
        (
            ["--max-num-batched-tokens", "8", "--max-num-seqs", "16"],
            "max_num_batched_tokens: must be at least max_num_seqs, which is 16, not 8",
        ),
        (["--gpu-memory-utilization", "1.5"], "gpu_memory_utilization: must be above 0 and at most 1"),
        (["--dtype", "int3"], "dtype: must be one of auto, float32"),
        (["--device", "toaster"], "device: must be auto, cpu"),
        (["--log-level", "loud"], "log_level: must be one of"),
        (["prot=1"], "port"),
        (["--config", "/no/such/file.yaml"], "/no/such/file.yaml"),
        (["sharing=all"], "sharing"),
    ],
)
def test_bad_settings_are_named(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse(*words)
