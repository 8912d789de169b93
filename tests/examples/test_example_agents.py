"""The examples as users run them: programs of their own, against a real server of the embedded model."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import make_adapter_set

from lragent.models import load_model, resolve_model
from lragent.pack import write_pack

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "2", "NO_PROXY": "127.0.0.1", "LANGSMITH_TRACING": "false"}
STEP = re.compile(r"(\w+): .* \[(\d+) tokens computed, (\d+) reused\]")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of three roles that say nothing sensible: their B is random."""
    place = tmp_path_factory.mktemp("served")
    source = resolve_model()
    write_pack(
        place / "team.safetensors",
        replace(make_adapter_set(load_model(source)), base_fingerprint=source.fingerprint()),
    )
    command = [sys.executable, "-m", "lragent.cli.main", "serve", "--roles", str(place / "team.safetensors")]
    with open(place / "log", "w+") as log:
        process = subprocess.Popen(
            [*command, "--port", "0"], stdout=subprocess.PIPE, stderr=log, text=True, env=ENVIRONMENT
        )
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("lragent: serving on "), (place / "log").read_text()
            yield f"{line.split()[-1]}/v1"
        finally:
            process.terminate()
            process.communicate(timeout=30)


@pytest.mark.parametrize("name", ["openai_agent", "langgraph_agent"])
def test_all_roles_speak_and_each_reuses_what_the_others_left(name: str, url: str) -> None:
    if name == "langgraph_agent":
        pytest.importorskip("langgraph")
        pytest.importorskip("langchain_openai")
    question = f"Where was the founder of Zenvor born, {name}?"  # unlike the other's, so that it computes its own
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), "--base-url", url, "--question", question]
    done = subprocess.run(
        [*command, "--turns", "2", "--max-tokens", "12"],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *lines, answer = done.stdout.splitlines()
    steps = [(found[1], int(found[2]), int(found[3])) for found in map(STEP.fullmatch, lines) if found]
    assert [role for role, _, _ in steps] == ["plan", "action", "plan", "action", "reflect"]
    for (_, computed, reused), (_, computed_after, reused_after) in itertools.pairwise(steps):
        # All that was in the cache after the step before; the last token of an answer never was a prompt.
        assert reused_after >= computed + reused
        assert computed_after < 60
    assert any(line.startswith("tool: ") for line in lines)
    assert answer.startswith("answer: ")
