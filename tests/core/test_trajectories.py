"""Rows of training data: what is taken, and errors that name file, line and field."""

from typing import Any

import pytest
from tiny import tiny_tokenizer

from lragent.chat import Renderer
from lragent.errors import UserError
from lragent.trajectories import TextCompletion, Trajectory, parse_row, read_row

ROLES = ("plan", "action")


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def says(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def read(row: Any) -> Trajectory | TextCompletion:
    return read_row(row, ROLES, source="d.jsonl:7")


def test_a_messages_row() -> None:
    messages = [user("x"), says("y", name="plan"), {"role": "tool", "content": "t"}, says("z", name="action")]
    trajectory = read({"messages": messages, "other": 3})
    assert trajectory == Trajectory("d.jsonl:7", tuple(messages), per_role_only=False)
    rendered = trajectory.render(Renderer(tiny_tokenizer()))
    assert [author for author in rendered.authors if author] == ["plan"] * 2 + ["action"] * 2


def test_prompt_and_completion_as_messages_teach_the_completion_only() -> None:
    row = {"prompt": [user("x"), says("y", name="action")], "completion": [says("z")], "role": "plan"}
    trajectory = read(row)
    assert trajectory.per_role_only
    tokenizer = tiny_tokenizer()
    rendered = trajectory.render(Renderer(tokenizer))
    authored = [token for token, author in zip(rendered.token_ids, rendered.authors, strict=True) if author]
    assert tokenizer.decode(authored) == "z<|im_end|>"
    assert {author for author in rendered.authors if author} == {"plan"}
    whole = Renderer(tokenizer).render([user("x"), says("y"), says("z")])
    assert rendered.token_ids == whole.token_ids
    assert "name" not in row["completion"][0]


def test_prompt_and_completion_as_texts_have_no_turns() -> None:
    completion = read({"prompt": "the ", "completion": "and", "role": "action", "messages": None})
    assert completion == TextCompletion("d.jsonl:7", "the ", "and", "action")
    tokenizer = tiny_tokenizer()
    rendered = completion.render(Renderer(tokenizer))
    assert tokenizer.decode(rendered.token_ids) == "the and<|im_end|>"
    assert [author for author in rendered.authors if author] == ["action"] * 2


@pytest.mark.parametrize(
    ("row", "start"),
    [
        ([], "expected an object"),
        ("x", "expected an object"),
        ({}, "prompt: is missing; a row has `messages`, or `prompt`, `completion` and `role` (found: nothing)"),
        ({"message": []}, "prompt: is missing"),
        ({"messages": []}, "messages: is empty"),
        ({"messages": "x"}, "messages: expected a list"),
        (
            {"messages": [user("x"), says("y")]},
            "messages[1].name: is missing; name the role that wrote it (plan, action)",
        ),
        ({"messages": [user("x"), says("y", name="plam")]}, "messages[1].name: 'plam' is not one of the roles"),
        ({"messages": [user("x"), says("y", name="base")]}, "messages[1].name: 'base' is not one of the roles"),
        ({"messages": [{"role": "user"}]}, "messages[0].content: is missing"),
        ({"messages": [user("x")], "prompt": "x"}, "prompt: stands beside `messages`"),
        ({"prompt": "x", "completion": "y"}, "role: is missing"),
        ({"prompt": "x", "role": "plan"}, "completion: is missing"),
        ({"prompt": "x", "completion": "y", "role": "plam"}, "role: 'plam' is not one of the roles"),
        ({"prompt": "x", "completion": "y", "role": 3}, "role: 3 is not one of the roles"),
        ({"prompt": "x", "completion": [says("y")], "role": "plan"}, "completion: give `prompt` and `completion` both"),
        ({"prompt": 3, "completion": 4, "role": "plan"}, "prompt: expected a list of messages, found a number"),
        ({"prompt": "\ud800", "completion": "y", "role": "plan"}, "prompt"),
        ({"prompt": [user("x")], "completion": [], "role": "plan"}, "completion: is empty"),
        (
            {"prompt": [user("x")], "completion": [says("y", name="action")], "role": "plan"},
            "completion[0].name: is 'action', but the row's role is 'plan'",
        ),
    ],
)
def test_a_bad_row_is_one_sentence_with_file_line_and_field(row: Any, start: str) -> None:
    with pytest.raises(UserError) as caught:
        read(row)
    assert str(caught.value).startswith(f"d.jsonl:7: {start}")


@pytest.mark.parametrize("line", ["{", "", "{'a': 1}", '{"a": 1} x', "[" * 100_000])
def test_a_line_that_is_no_json_names_file_and_line(line: str) -> None:
    with pytest.raises(UserError, match=r"^d\.jsonl:7: is not a line of JSON"):
        parse_row(line, source="d.jsonl:7")
