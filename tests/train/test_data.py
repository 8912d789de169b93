"""Examples and batches: roles, targets and views worked by hand; errors name file and line; plans lose nothing."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_tokenizer

from lragent.chat import Rendered, Renderer
from lragent.errors import UserError
from lragent.train.batches import PackedBatch, TokenBatches, pack
from lragent.train.data import NO_TARGET, Example, RoleViews
from lragent.train.examples import load_examples

ROLES = ("plan", "action", "reflect")
SYSTEM = {"role": "system", "content": "s"}
USER = {"role": "user", "content": "x"}
TOOL = {"role": "tool", "content": "t"}


def says(name: str, text: str) -> dict[str, Any]:
    return {"role": "assistant", "name": name, "content": text}


TEAM = [SYSTEM, USER, says("plan", "p"), says("action", "a"), TOOL, says("plan", "q")]


def write(tmp_path: Path, *rows: Any) -> Path:
    path = tmp_path / "d.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def load(path: Path, **options: Any) -> list[Example]:
    settings: dict[str, Any] = {"objective": "shared", "prefix_writer": "base"} | options
    return load_examples(path, Renderer(tiny_tokenizer()), ROLES, **settings)


class LetterRenderer:
    """Reads each message as one token per letter, opened by `<` and ended by `>`: for examples worked by hand."""

    def digest(self) -> str:
        return "letters"

    def render(self, messages: Any) -> Rendered:
        ids, authors, openings = [], [], []
        for message in messages:
            author = message.get("name")
            if message["role"] == "assistant":
                openings.append((len(ids), len(ids) + 1))
            ids += map(ord, f"<{message['content']}>")
            authors += [None] + [author] * (len(message["content"]) + 1)
        return Rendered(ids, authors, openings)


def letters(row: Any, tmp_path: Path, **options: Any) -> Example:
    settings: dict[str, Any] = {"objective": "shared", "prefix_writer": "base"} | options
    (example,) = load_examples(write(tmp_path, row), LetterRenderer(), ROLES, **settings)  # type: ignore[arg-type]
    return example


def text_of(ids: torch.Tensor) -> str:
    return "".join("." if index == NO_TARGET else chr(index) for index in ids.tolist())


def digits(numbers: torch.Tensor) -> str:
    return "".join(map(str, numbers.tolist()))


def test_a_hand_worked_trajectory(tmp_path: Path) -> None:
    """Roles that follow one another, tool output between, a last tool output that nobody reads."""
    messages = [
        {"role": "user", "content": "uu"},
        says("plan", "p"),
        says("action", "ab"),
        TOOL,
        says("plan", "q"),
        TOOL,
    ]
    example = letters({"messages": messages}, tmp_path)
    assert text_of(example.token_ids) == "<uu><p><ab><t><q><t>"
    assert digits(example.authors) == "00000110222000011000"
    # `<p` leads plan to `p` and `>`; plan's `>` and the next opening are action's; action's `>` and the tool plan's.
    assert digits(example.roles) == "0000" + "11" + "2222" + "111111" + "1111"
    assert text_of(example.targets) == "....p>.ab>....q>...."
    assert digits(example.loss_roles) == "00001102220000110000"
    assert example.source.endswith("d.jsonl:1")
    first = letters({"messages": messages}, tmp_path, prefix_writer="first")
    assert digits(first.roles) == "111111" + "2222" + "1111111111"


def test_role_views_by_hand(tmp_path: Path) -> None:
    messages = [
        {"role": "user", "content": "uu"},
        says("plan", "p"),
        says("action", "ab"),
        TOOL,
        says("plan", "q"),
        TOOL,
    ]
    plan, action = RoleViews([letters({"messages": messages}, tmp_path)])
    assert text_of(plan.token_ids) == "<uu><p><ab><t><q>"
    assert digits(plan.roles) == "1" * 17
    assert text_of(plan.targets) == "....p>........q>."
    assert digits(plan.loss_roles) == "00001100000000110"
    assert text_of(action.token_ids) == "<uu><p><ab>"
    assert digits(action.roles) == "2" * 11
    assert text_of(action.targets) == ".......ab>."
    assert digits(action.authors) == "00000000222"


def test_truncation_keeps_the_beginning(tmp_path: Path) -> None:
    messages = [USER, says("plan", "pp"), says("action", "a")]
    whole = letters({"messages": messages}, tmp_path)
    cut = letters({"messages": messages}, tmp_path, max_length=6)
    assert text_of(cut.token_ids) == "<x><pp"
    assert digits(cut.roles) == digits(whole.roles)[:6]
    assert text_of(cut.targets) == "...pp."
    assert [digits(view.roles) for view in list(RoleViews([cut]))] == ["111111"]


def test_real_tokens_agree_with_the_renderer(tmp_path: Path) -> None:
    (example,) = load(write(tmp_path, {"messages": TEAM}))
    tokenizer = tiny_tokenizer()
    rendered = Renderer(tokenizer).render(TEAM)
    assert example.token_ids.tolist() == rendered.token_ids
    assert tokenizer.decode(example.targets[example.targets >= 0]) == "p<|im_end|>a<|im_end|>q<|im_end|>"
    assert example.loss_roles[example.loss_roles > 0].tolist() == [1, 1, 2, 2, 1, 1]
    for at in range(len(example) - 1):
        if example.loss_roles[at]:
            assert example.roles[at] == example.loss_roles[at]
    assert example.roles[: rendered.openings[0][0]].tolist() == [0] * rendered.openings[0][0]


def test_prompt_completion_rows_go_with_per_role_only(tmp_path: Path) -> None:
    row = {"prompt": [USER], "completion": [{"role": "assistant", "content": "a"}], "role": "action"}
    path = write(tmp_path, row, {"prompt": "x ", "completion": "an", "role": "plan"})
    chat, text = load(path, objective="per_role")
    assert chat.loss_roles.unique().tolist() == [0, 2]
    assert tiny_tokenizer().decode(text.targets[text.targets >= 0]) == "an<|im_end|>"
    for objective in ("shared", "mixed"):
        with pytest.raises(UserError, match=r"d\.jsonl:1: prompt/completion rows need `objective: per_role`"):
            load(path, objective=objective)


def test_rows_of_different_shapes_share_a_file_and_blank_lines_count(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "x\u2028y"}]
    path = write(
        tmp_path,
        {"messages": [{"role": "user", "content": parts}, says("plan", "p")], "id": 3},
        "",
        {"messages": TEAM, "id": "four"},
    )
    assert [example.source for example in load(path)] == [f"{path}:1", f"{path}:3"]


def test_parquet_gives_the_same_examples(tmp_path: Path) -> None:
    rows = [{"messages": TEAM}, {"messages": [USER, says("reflect", "r")]}]
    path = tmp_path / "d.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    for mine, other in zip(load(path), load(write(tmp_path, *rows)), strict=True):
        assert mine.token_ids.equal(other.token_ids)
        assert mine.roles.equal(other.roles)
        assert mine.authors.equal(other.authors)
    assert load(path)[1].source == f"{path}:2"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"messages": TEAM}, "{broken"], ":2: is not a line of JSON"),
        (["", {"messages": TEAM}, {"messages": [USER]}], ":3: no role authors anything at all"),
        ([{"messages": [USER, {"role": "assistant", "content": "x"}]}], ":1: messages[1].name: is missing"),
        ([{"messages": [USER, says("other", "x")]}], ":1: messages[1].name: 'other' is not one of the roles"),
        ([[1]], ":1: expected an object"),
        ([], ": holds no rows"),
        (["", " "], ": holds no rows"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, rows: list[Any], message: str) -> None:
    path = write(tmp_path, *rows)
    with pytest.raises(UserError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}{message}")


def test_nothing_authored_after_truncation_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, {"messages": TEAM})
    with pytest.raises(UserError, match=r"d\.jsonl:1: no role authors anything within the first 5 of its \d+ tokens"):
        load(path, max_length=5)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.jsonl: is not a file"):
        load(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="holds no file that ends in"):
        load(tmp_path)
    with pytest.raises(UserError, match="no file has such a name"):
        load(tmp_path / "*.jsonl")
    binary = tmp_path / "b.jsonl"
    binary.write_bytes(b'{"messages": []}\n\xff\xfe\n')
    with pytest.raises(UserError, match=r"b\.jsonl: cannot be read as UTF-8 text"):
        load(binary)
    broken = tmp_path / "b.parquet"
    broken.write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match=r"b\.parquet: cannot be read as a Parquet file"):
        load(broken)


def example_of(length: int, at: int = 0) -> Example:
    """Token ids that tell examples and positions apart; all but the first token authored by role 1."""
    ids = torch.arange(length) + 1000 * at
    authors = torch.ones(length, dtype=torch.long)
    authors[:1] = 0
    return Example(f"d:{at}", ids, authors, torch.full((length,), 1 + at % 2))


def test_pack_by_hand() -> None:
    batch = pack([example_of(3), example_of(2, at=1)])
    assert batch.input_ids.tolist() == [0, 1, 2, 1000, 1001]
    assert batch.position_ids.tolist() == [0, 1, 2, 0, 1]
    assert batch.spans == [(0, 3), (3, 5)]
    assert batch.roles.tolist() == [1, 1, 1, 2, 2]
    assert batch.targets.tolist() == [1, 2, NO_TARGET, 1001, NO_TARGET]
    assert batch.loss_roles.tolist() == [1, 1, 0, 1, 0]
    assert batch.sources == ("d:0", "d:1")
    moved = batch.to("meta")
    assert moved.input_ids.is_meta
    assert moved.targets.is_meta
    assert moved.spans == batch.spans


lengths = st.lists(st.integers(1, 30), min_size=1, max_size=20)


def seen(batches: list[PackedBatch]) -> list[str]:
    return sorted(source for batch in batches for source in batch.sources)


def epoch_of(batches: TokenBatches, epoch: int) -> list[PackedBatch]:
    before = sum(batches.count(earlier) for earlier in range(epoch))
    return [batches.batch(before + at) for at in range(batches.count(epoch))]


@settings(deadline=None)
@given(lengths, st.integers(1, 60), st.integers(0, 5), st.integers(0, 3))
def test_every_example_once_an_epoch_within_the_budget(sizes: list[int], budget: int, seed: int, epoch: int) -> None:
    examples = [example_of(size, at) for at, size in enumerate(sizes)]
    batches = epoch_of(TokenBatches(examples, tokens_per_batch=budget, seed=seed), epoch)
    assert seen(batches) == sorted(example.source for example in examples)
    for batch in batches:
        assert len(batch.input_ids) <= budget or len(batch.spans) == 1
        assert [end for _, end in batch.spans[:-1]] == [start for start, _ in batch.spans[1:]]
        assert (batch.spans[0][0], batch.spans[-1][1]) == (0, len(batch.input_ids))


def test_the_order_is_fixed_by_seed_and_epoch() -> None:
    examples = [example_of(3, at) for at in range(30)]

    def order(seed: int, epoch: int) -> list[tuple[str, ...]]:
        return [batch.sources for batch in epoch_of(TokenBatches(examples, tokens_per_batch=9, seed=seed), epoch)]

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)
    assert len(order(0, 0)) == 10


def test_misuse_of_batches_is_refused() -> None:
    with pytest.raises(ValueError, match="no examples"):
        TokenBatches([], tokens_per_batch=9, seed=0)


def test_a_message_of_weight_zero_is_spoken_but_not_learnt(tmp_path: Path) -> None:
    wrong = says("plan", "w")
    right = [SYSTEM, USER, wrong, says("reflect", "r"), says("plan", "q")]
    learnt = load(write(tmp_path, {"messages": right}))[0]
    muted = load(write(tmp_path, {"messages": [SYSTEM, USER, wrong | {"weight": 0}, *right[3:]]}))[0]
    assert torch.equal(learnt.token_ids, muted.token_ids)
    assert torch.equal(learnt.roles, muted.roles)
    changed = (learnt.authors != muted.authors).nonzero().squeeze(-1)
    assert changed.tolist() == list(range(changed[0], changed[0] + 2))  # the content's one token, and its end-of-turn
    assert muted.authors[changed].tolist() == [0, 0]
    with pytest.raises(UserError, match=r"messages\[2\]\.weight: is 2; use 1"):
        load(write(tmp_path, {"messages": [SYSTEM, USER, wrong | {"weight": 2}]}))
