"""The demo from end to end on a tiny model, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console
from tiny import save_tiny, tiny_tokenizer

from lragent.chat import Renderer
from lragent.cli.main import main
from lragent.errors import UserError
from lragent.eval.agent import Reply
from lragent.eval.demo import MARKER, DemoSettings, run_demo
from lragent.eval.side_by_side import turn_of


@pytest.mark.slow
def test_the_whole_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, model = tmp_path / "demo", save_tiny(tmp_path / "tiny")
    words = ["demo", "--out", str(out), "--model", str(model), "--train-minutes", "0.05", "--minutes", "0.06"]
    assert main([*words, "--questions", "3", "--shown", "1"]) == 0
    shown = capsys.readouterr().out
    numbers = json.loads(shown.splitlines()[-1])
    assert numbers["roles"] == ["plan", "action", "reflect"]
    assert numbers["train_loss_first"] > 0
    assert 0 < numbers["pack_bytes"] < numbers["separate_adapter_bytes"]
    assert (numbers["answers_total"], numbers["untrained_total"]) == (3, 3)
    assert 0 <= numbers["answers_correct"] <= 3
    assert numbers["steps_compared"] >= 10  # a model that talks nonsense uses up its ten iterations
    assert numbers["tokens_computed"] < numbers["tokens_reused"]
    assert min(numbers[name] for name in numbers if name.startswith("ttft_sum")) > 0
    assert "accelerate launch" in shown
    assert (out / "roles" / "pack.safetensors").is_file()
    assert "serving on http://127.0.0.1:" in (out / "serve.log").read_text()


def test_a_failing_step_ends_it_with_its_output(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["demo", "--out", str(tmp_path / "demo"), "--model", str(tmp_path / "none"), "--train-minutes", "0.05"]
    assert main(words) == 1
    error = capfd.readouterr().err
    assert "there is no model folder" in error
    assert "error: accelerate ended with status" in error.splitlines()[-1]


def test_folders_of_others_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not the demo's"):
        run_demo(DemoSettings(out=tmp_path), Console())
    assert (tmp_path / "thesis.txt").read_text() == "mine"
    link = tmp_path / "link"
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / MARKER).touch()
    link.symlink_to(tmp_path / "ours")
    with pytest.raises(UserError, match="not a folder"):
        run_demo(DemoSettings(out=link), Console())


@pytest.mark.parametrize(
    ("settings", "name"),
    [({"shown": 0}, "shown"), ({"questions": 0}, "questions"), ({"minutes": 1, "train_minutes": 2}, "train_minutes")],
)
def test_settings_that_make_no_demo_are_refused(settings: dict[str, float], name: str) -> None:
    with pytest.raises(UserError, match=f"^{name}:"):
        DemoSettings(**settings)  # type: ignore[arg-type]


def test_a_turn_is_cut_where_it_was_generated() -> None:
    tokenizer = tiny_tokenizer()
    renderer = Renderer(tokenizer)
    messages = [{"role": "user", "content": "Where?"}, {"role": "assistant", "name": "plan", "content": "Search"}]
    spoken = tokenizer("Search", add_special_tokens=False).input_ids
    ended = turn_of(renderer, messages, Reply("Search", generated_tokens=len(spoken) + 1))
    assert ended.role == "plan"
    assert ended.answer_ids == (*spoken, renderer.end_of_turn)
    assert tokenizer.decode(list(ended.prompt_ids)).endswith("Where?<|im_end|>\n<|im_start|>assistant\n")
    cut_short = turn_of(renderer, messages, Reply("Search", generated_tokens=len(spoken)))
    assert cut_short.answer_ids == tuple(spoken)
