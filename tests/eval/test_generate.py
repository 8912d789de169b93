"""Data sets on disk, and the command that writes them."""

import argparse
import json
from pathlib import Path

import pytest

from lragent.cli import world as command
from lragent.errors import UserError
from lragent.eval.world.generate import EVAL_FILE, TEST_FILE, TRAIN_FILE, make_data_set, with_counts, write_data_set
from lragent.eval.world.levels import LEVELS
from lragent.eval.world.testset import load_test_set

TINY = with_counts(LEVELS["demo"], 12, 3, 8)


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    return parser.parse_args(["world", *arguments])


def test_the_command_writes_three_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "new" / "demo"
    args = parse("--level", "demo", "--seed", "4", "-o", str(folder), "--train", "12", "--eval", "3", "--test", "8")
    assert args.run(args) == 0
    assert sorted(path.name for path in folder.iterdir()) == [EVAL_FILE, TEST_FILE, TRAIN_FILE]
    data = make_data_set(TINY, seed=4)
    rows = [json.loads(line) for line in (folder / TRAIN_FILE).read_text().splitlines()]
    assert rows == [{"messages": messages} for messages in data.train]
    assert len((folder / EVAL_FILE).read_text().splitlines()) == 3
    assert load_test_set(folder / TEST_FILE) == data.test
    assert "never searches answers at most" in capsys.readouterr().out


def test_every_assistant_message_names_a_role_and_ends_right() -> None:
    for messages in make_data_set(TINY, seed=0).train:
        assert {m["name"] for m in messages if m["role"] == "assistant"} == {"plan", "action", "reflect"}
        assert all(m["content"] for m in messages)
        assert messages[-1]["content"].endswith("right")


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(UserError, match="is there already"):
        write_data_set(TINY, 0, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^count: the world has no"):
        write_data_set(with_counts(TINY, test=100_000), 0, tmp_path / "demo")
    assert not list(tmp_path.iterdir())


def test_counts_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^eval_count: is 0; at least one is needed"):
        write_data_set(with_counts(TINY, evaluation=0), 0, tmp_path / "demo")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "is no JSON"),
        ("[]", "is no test world"),
        ('{"format": "lragent-test-world", "version": 99}', "has version 99"),
        ('{"format": "lragent-test-world", "version": 1}', "a field is missing"),
        ('{"format": "lragent-test-world", "version": 1, "pages": [{"title": 1}]}', "a field is missing"),
    ],
)
def test_a_bad_test_world_is_refused_by_name(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(UserError, match=rf"bad\.json: {complaint}"):
        load_test_set(path)


def test_a_missing_test_world_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.json: cannot be read"):
        load_test_set(tmp_path / "none.json")
