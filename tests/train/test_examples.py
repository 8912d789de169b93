"""Sources of rows, and examples in their cache."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_loop import rows
from tiny import tiny_tokenizer

from lragent.chat import Renderer
from lragent.errors import UserError
from lragent.train import examples as module
from lragent.train import rows as sources
from lragent.train.data import Example
from lragent.train.examples import Examples, load_examples
from lragent.train.rows import content_digest, locate, read_rows

ROLES = ("plan", "action", "reflect")


def load(spec: Path | str, **options: Any) -> Examples:
    plain: dict[str, Any] = {"objective": "shared", "prefix_writer": "base"}
    return load_examples(spec, Renderer(tiny_tokenizer()), ROLES, **(plain | options))


def write(path: Path, count: int) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(count)))
    return path


def same(one: Example, other: Example) -> bool:
    return one.source == other.source and all(
        torch.equal(getattr(one, name), getattr(other, name)) for name in ("token_ids", "authors", "roles")
    )


numbers = st.lists(st.tuples(st.integers(0, 2**31 - 1), st.integers(0, 300), st.integers(0, 300)), min_size=1)


@settings(deadline=None, max_examples=30)
@given(st.lists(numbers, min_size=1, max_size=6))
def test_what_is_laid_out_and_read_back_is_the_same(tmp_path_factory: pytest.TempPathFactory, given: Any) -> None:
    made = [
        Example(f"d:{at}", *(torch.tensor(column) for column in zip(*some, strict=True)))
        for at, some in enumerate(given)
    ]
    path = tmp_path_factory.mktemp("e") / "e.safetensors"
    Examples.of(made).write(path, {"fact": "x"})
    found = Examples.read(path)
    assert found is not None
    back, facts = found
    assert facts == {"fact": "x"}
    assert back.lengths == [len(example) for example in made]
    assert all(same(one, other) for one, other in zip(made, back, strict=True))
    assert back.digest == Examples.of(made).digest


def test_the_second_time_nothing_is_rendered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "d.jsonl", 5)
    first = load(path)
    with monkeypatch.context() as patched:
        patched.setattr(module, "example_of", None)
        again = load(path)
    assert again.digest == first.digest
    assert all(same(one, other) for one, other in zip(first, again, strict=True))
    path.write_text(path.read_text().replace("one two", "two"))
    assert load(path).digest != first.digest
    assert load(path, max_length=100).lengths != first.lengths
    assert load(path, prefix_writer="first").digest != load(path).digest


@pytest.mark.parametrize("how", ["cut off", "changed", "empty", "other"])
def test_a_damaged_cache_is_made_anew(how: str, tmp_path: Path, own_cache: Path) -> None:
    path = write(tmp_path / "d.jsonl", 5)
    first = load(path)
    newest = max((own_cache / "examples").glob("*.safetensors"), key=lambda file: file.stat().st_mtime_ns)
    content = bytearray(newest.read_bytes())
    content[-9] ^= 1
    damaged = {"cut off": content[:-5], "changed": content, "empty": b"", "other": b"not safetensors at all"}[how]
    newest.write_bytes(bytes(damaged))
    assert Examples.read(newest) is None
    again = load(path)
    assert again.digest == first.digest
    assert Examples.read(newest) is not None


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise UserError("cannot write: No space left on device")

    monkeypatch.setattr(module, "write_file", full)
    assert len(load(write(tmp_path / "full.jsonl", 2))) == 2


def test_where_there_can_be_no_cache_each_run_renders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr(module, "cache_root", lambda: tmp_path / "file")
    assert len(load(write(tmp_path / "d.jsonl", 2))) == 2


def _render(path: Path, results: Any) -> None:
    results.put(load(path).digest)


def test_processes_that_come_together_render_once(tmp_path: Path, own_cache: Path) -> None:
    path = write(tmp_path / "race.jsonl", 40)
    before = set((own_cache / "examples").glob("*.safetensors")) if own_cache.is_dir() else set()
    context = multiprocessing.get_context("fork")
    results: Any = context.Queue()
    children = [context.Process(target=_render, args=(path, results)) for _ in range(3)]
    for child in children:
        child.start()
    digests = {results.get(timeout=60) for _ in children}
    for child in children:
        child.join()
    assert digests == {load(path).digest}
    assert len(set((own_cache / "examples").glob("*.safetensors")) - before) == 1


def test_only_so_many_data_sets_are_kept(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT", 2)
    for count in (1, 2, 3, 4):
        load(write(tmp_path / f"{count}.jsonl", count))
    assert len(list((own_cache / "examples").glob("*.safetensors"))) == 2


# -- sources -------------------------------------------------------------------------------------------------------


def test_a_folder_and_a_pattern_are_all_their_files(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", 2)
    write(tmp_path / "a.jsonl", 1)
    (tmp_path / "notes.txt").write_text("no rows")
    found = [source for _, source in read_rows(tmp_path)]
    assert found == [f"{tmp_path}/a.jsonl:1", f"{tmp_path}/b.jsonl:1", f"{tmp_path}/b.jsonl:2"]
    assert [source for _, source in read_rows(tmp_path / "*.jsonl")] == found
    before = content_digest(tmp_path)
    write(tmp_path / "c.jsonl", 1)
    assert content_digest(tmp_path) != before


@pytest.mark.parametrize(
    ("spec", "name", "config", "split"),
    [
        ("org/set", "org/set", None, "train"),
        ("org/set@test", "org/set", None, "test"),
        ("org/set:easy@train+test", "org/set", "easy", "train+test"),
    ],
)
def test_a_dataset_of_the_hub_is_streamed(
    spec: str, name: str, config: str | None, split: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def hub(*args: Any, **options: Any) -> Any:
        asked.append((args, options))
        return iter(rows(3))

    monkeypatch.setattr(datasets, "load_dataset", hub)
    monkeypatch.setattr(sources, "_revision", lambda source: "1234")
    found = load(spec)
    assert asked == [((name, config), {"split": split, "streaming": True})]
    assert found[2].source == f"{name}[{split}]:3"
    assert len(found) == 3


@pytest.mark.parametrize("spec", ["./none", "none.jsonl", "/no/where", "a/b/c", "a b/c", "~/x"])
def test_what_is_neither_a_file_nor_a_dataset_is_refused(spec: str) -> None:
    with pytest.raises(UserError, match="is not a file; give a JSONL or Parquet file"):
        locate(spec)


def test_a_hub_that_does_not_answer_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*args: Any, **options: Any) -> Any:
        raise ConnectionError("no route\nmore")

    monkeypatch.setattr(datasets, "load_dataset", gone)
    with pytest.raises(UserError, match=r"org/set: is no file here, .*\(no route\)"):
        list(read_rows("org/set"))
