"""Tools over the API: calls read from what a (scripted) model says, whole and streamed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from api_fakes import FakeService, live_server

from lragent.chat_tools import HermesForm, ToolCall
from lragent.serve.engine.types import GenerationRequest

PARAMETERS = {"type": "object", "properties": {"q": {"type": "string"}}}
TOOLS: Any = [
    {"type": "function", "function": {"name": name, "parameters": PARAMETERS}} for name in ("search", "finish")
]
ASKED: Any = {"model": "plan", "messages": [{"role": "user", "content": "Who?"}], "tools": TOOLS}
ONE = HermesForm().write("", [ToolCall("search", {"q": "Zenvor"})])
TWO = HermesForm().write("I look.", [ToolCall("search", {"q": "é\n"}), ToolCall("finish", {})])


class Scripted(FakeService):
    """Says what it is told to."""

    says = ""

    def _letters(self, request: GenerationRequest, text: str) -> Iterator[str]:
        yield from self.says


@pytest.fixture(scope="module")
def scripted() -> Scripted:
    return Scripted()


@pytest.fixture(scope="module")
def client(scripted: Scripted) -> Iterator[openai.OpenAI]:
    with (
        live_server(scripted) as url,
        openai.OpenAI(
            base_url=f"{url}/v1", api_key="none", max_retries=0, http_client=openai.DefaultHttpxClient(trust_env=False)
        ) as made,
    ):
        yield made


def streamed(client: openai.OpenAI, **more: Any) -> tuple[str, list[tuple[str, str]], str]:
    """Content, calls and finish reason, put together as clients do."""
    content, calls, reason = "", {}, ""
    for chunk in client.chat.completions.create(**ASKED, stream=True, **more):
        choice = chunk.choices[0]
        content += choice.delta.content or ""
        for call in choice.delta.tool_calls or []:
            entry = calls.setdefault(call.index, ["", ""])
            assert call.id or entry[0]
            entry[0] += call.function.name or ""
            entry[1] += call.function.arguments or ""
        reason = choice.finish_reason or reason
    return content, [(name, arguments) for name, arguments in calls.values()], reason


@pytest.mark.parametrize(
    ("says", "content", "calls"),
    [
        (ONE, None, [("search", {"q": "Zenvor"})]),
        (TWO, "I look.", [("search", {"q": "é\n"}), ("finish", {})]),
        ("No call.", "No call.", []),
        ("a < b <tool", "a < b <tool", []),
        ("<tool_call>\nbroken\n</tool_call>", "<tool_call>\nbroken\n</tool_call>", []),
    ],
)
def test_calls_are_read(
    client: openai.OpenAI, scripted: Scripted, says: str, content: str | None, calls: list[tuple[str, Any]]
) -> None:
    scripted.says = says
    answer = client.chat.completions.create(**ASKED)
    choice = answer.choices[0]
    assert choice.message.content == content
    found = [(call.function.name, json.loads(call.function.arguments)) for call in choice.message.tool_calls or []]
    assert found == calls
    assert choice.finish_reason == ("tool_calls" if calls else "stop")
    assert len({call.id for call in choice.message.tool_calls or []}) == len(calls)
    said, pieces, reason = streamed(client)
    assert said == (content or "")
    assert [(name, json.loads(arguments)) for name, arguments in pieces] == calls
    assert reason == choice.finish_reason


def test_nothing_is_read_where_nothing_may_be_called(client: openai.OpenAI, scripted: Scripted) -> None:
    scripted.says = ONE
    answer = client.chat.completions.create(**ASKED, tool_choice="none")
    assert answer.choices[0].message.content == ONE
    assert answer.choices[0].message.tool_calls is None
    without = client.chat.completions.create(model="plan", messages=ASKED["messages"])
    assert without.choices[0].message.content == ONE


def test_the_prompt_shows_the_tools(client: openai.OpenAI, scripted: Scripted) -> None:
    scripted.says = "x"
    client.chat.completions.create(**ASKED)
    prompt = scripted.tokenizer.decode(scripted.requests[-1].prompt.ids.tolist())
    assert prompt.startswith("tool|search\ntool|finish\n")


def test_a_call_in_another_spelling_is_remembered_as_the_same_tokens(client: openai.OpenAI, scripted: Scripted) -> None:
    scripted.says = '<tool_call>{"name":"search","arguments":{"q":"a"}}</tool_call>'
    client.chat.completions.create(**ASKED)
    spelled, canonical = scripted.chat.remembered
    assert spelled == scripted.says
    assert canonical == HermesForm().write("", [ToolCall("search", {"q": "a"})])


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "finish"}}])
def test_a_call_that_must_be_is_asked_for_by_a_grammar(client: openai.OpenAI, scripted: Scripted, choice: Any) -> None:
    scripted.says = ONE
    client.chat.completions.create(**ASKED, tool_choice=choice)
    grammar = scripted.requests[-1].params.grammar
    assert grammar is not None
    assert ("search" in grammar.source) == (choice == "required")
    client.chat.completions.create(**ASKED, tool_choice="auto")
    assert scripted.requests[-1].params.grammar is None


def test_not_together_with_a_format(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="tools: cannot be used together"):
        client.chat.completions.create(**ASKED, response_format={"type": "json_object"})
