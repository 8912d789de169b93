"""Tool calls as text: how families of chat templates write them, and how they are read back.

What an assistant says is text, calls too; OpenAI's `tool_calls` are a view of it. A family is used only where a
tokenizer's own template writes a call just as the family does (`tool_form`).
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lragent.errors import UserError

MOST_TOOLS = 128
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclass(frozen=True)
class ToolCall:
    """A function that the assistant wants called. arguments: an object of JSON."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class ToolChoice:
    """Whether an answer may (auto), must not (none) or must (required) call; and which function, where that is said."""

    mode: str = "auto"
    name: str | None = None


class ToolForm(ABC):
    """One family's way to write calls."""

    @abstractmethod
    def write(self, content: str, calls: Sequence[ToolCall]) -> str:
        """An assistant's text with `calls`."""

    @abstractmethod
    def read(self, text: str) -> tuple[str, list[ToolCall]]:
        """The content of an assistant's text, and its calls. A text that holds none, or broken ones, is all content."""

    @abstractmethod
    def certain(self, text: str) -> int:
        """How many characters of an unfinished text are content, however it goes on."""

    @abstractmethod
    def grammar(self, tools: Sequence[Mapping[str, Any]], *, many: bool) -> str:
        """In Lark's notation as llguidance reads it: a text that calls one of `tools`, or several of them if `many`."""


class HermesForm(ToolForm):
    """`<tool_call>` tags around `{"name": …, "arguments": …}`, each on lines of their own: Hermes, Qwen 2.5 and 3."""

    BEGIN, END = "<tool_call>", "</tool_call>"

    def write(self, content: str, calls: Sequence[ToolCall]) -> str:
        """See ToolForm."""
        written = [f"{self.BEGIN}\n{_object(call, 'arguments')}\n{self.END}" for call in calls]
        return "\n".join([content, *written] if content else written)

    def read(self, text: str) -> tuple[str, list[ToolCall]]:
        """See ToolForm."""
        content, begin, rest = text.partition(self.BEGIN)
        calls = []
        while begin:
            read = _read_object(rest, "arguments")
            if read is None:
                return text, []
            call, end = read
            calls.append(call)
            rest = rest[end:].lstrip().removeprefix(self.END)
            between, begin, rest = rest.partition(self.BEGIN)
            if between.strip():
                return text, []
        return (content.removesuffix("\n"), calls) if calls else (text, [])

    def certain(self, text: str) -> int:
        """See ToolForm."""
        at = text.find(self.BEGIN)
        if at < 0:
            at = next((cut for cut in range(max(0, len(text) - len(self.BEGIN)), len(text))
                       if self.BEGIN.startswith(text[cut:])), len(text))  # fmt: skip
        return len(text[:at].removesuffix("\n"))

    def grammar(self, tools: Sequence[Mapping[str, Any]], *, many: bool) -> str:
        """See ToolForm."""
        begin, end = json.dumps(f"{self.BEGIN}\n"), json.dumps(f"\n{self.END}")
        rest = ' ("\\n" call)*' if many else ""
        return f"start: call{rest}\ncall: {begin} body {end}\n{_bodies(tools, 'arguments')}"


class LlamaForm(ToolForm):
    """The whole text is `{"name": …, "parameters": …}`: Llama 3.1, 3.2 and 3.3. One call at a time."""

    def write(self, content: str, calls: Sequence[ToolCall]) -> str:
        """See ToolForm."""
        if len(calls) != 1:
            raise UserError("tool_calls: this model's chat template takes one call in a message, not several.")
        return _object(calls[0], "parameters")

    def read(self, text: str) -> tuple[str, list[ToolCall]]:
        """See ToolForm."""
        read = _read_object(text.removeprefix("<|python_tag|>"), "parameters")
        return ("", [read[0]]) if read is not None else (text, [])

    def certain(self, text: str) -> int:
        """See ToolForm."""
        begins = text.lstrip()
        return 0 if not begins or begins.startswith(("{", "<")) else len(text)

    def grammar(self, tools: Sequence[Mapping[str, Any]], *, many: bool) -> str:
        """See ToolForm."""
        return f"start: body\n{_bodies(tools, 'parameters')}"


FORMS: tuple[ToolForm, ...] = (HermesForm(), LlamaForm())

_TRIED = ToolCall("look_up", {"name": "Zenvor é", "deep": {"n": [1, True, None]}})
_TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Looks a name up.",
        "parameters": {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]},
    },
}


def tool_form(tokenizer: Any) -> ToolForm | None:
    """The family that a tokenizer's chat template is of; None where it shows no tools, or writes calls otherwise."""
    asked = {"role": "user", "content": "qz0zq"}
    call = {
        "id": "call_123456",
        "type": "function",
        "function": {"name": _TRIED.name, "arguments": dict(_TRIED.arguments)},
    }
    try:
        plain = tokenizer.apply_chat_template([asked], tokenize=False)
        shown = tokenizer.apply_chat_template([asked], tokenize=False, tools=[_TOOL])
        said = {"role": "assistant", "content": "", "tool_calls": [call]}
        called = tokenizer.apply_chat_template([asked, said], tokenize=False, tools=[_TOOL])
    except Exception:  # a template is a program: it may raise anything
        return None
    if shown == plain or _TRIED.name not in shown or not called.startswith(shown):
        return None
    return next((form for form in FORMS if form.write("", [_TRIED]) in called[len(shown) :]), None)


def check_tools(tools: Any, choice: Any) -> tuple[list[dict[str, Any]], ToolChoice]:
    """A request's `tools` and `tool_choice`. Raises UserError naming the part that is wrong."""
    found = [_checked(tool, f"tools[{at}]") for at, tool in enumerate(tools or [])]
    names = [tool["function"]["name"] for tool in found]
    if len(found) > MOST_TOOLS:
        raise UserError(f"tools: at most {MOST_TOOLS} may be offered, not {len(found)}.")
    if len(set(names)) < len(names):
        raise UserError("tools: two of them have the same name.")
    if choice is None:
        return found, ToolChoice("auto" if found else "none")
    if isinstance(choice, Mapping):
        function = choice.get("function")
        name = function.get("name") if isinstance(function, Mapping) else None
        if choice.get("type") != "function" or name not in names:
            raise UserError(f"tool_choice: must name one of the tools ({', '.join(names) or 'there are none'}).")
        return found, ToolChoice("required", name)
    if choice not in ("none", "auto", "required"):
        raise UserError('tool_choice: must be none, auto, required or {"type": "function", "function": {"name": …}}.')
    if choice == "required" and not found:
        raise UserError("tool_choice: required needs tools.")
    return found, ToolChoice(choice)


def read_tool_calls(value: Any, where: str) -> list[ToolCall]:
    """A message's `tool_calls`. Raises UserError that begins with the field."""
    if not isinstance(value, list | tuple):
        raise UserError(f"{where}: expected a list of calls.")
    calls = []
    for at, each in enumerate(value):
        function = each.get("function") if isinstance(each, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise UserError(f"{where}[{at}].function: expected a name and arguments.")
        arguments = function.get("arguments") or "{}"
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except ValueError:
                raise UserError(f"{where}[{at}].function.arguments: is not valid JSON.") from None
        if not isinstance(arguments, Mapping):
            raise UserError(f"{where}[{at}].function.arguments: expected an object.")
        calls.append(ToolCall(function["name"], arguments))
    return calls


def _checked(tool: Any, where: str) -> dict[str, Any]:
    if not isinstance(tool, Mapping) or tool.get("type") != "function":
        raise UserError(f'{where}.type: only tools of type "function" are supported.')
    function = tool.get("function")
    if not isinstance(function, Mapping):
        raise UserError(f"{where}.function: expected an object with name and parameters.")
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UserError(f"{where}.function.name: must be 1 to 64 letters, digits, '_', '-' or '.'.")
    if not isinstance(function.get("description", ""), str):
        raise UserError(f"{where}.function.description: expected a text.")
    if not isinstance(function.get("parameters", {}), Mapping):
        raise UserError(f"{where}.function.parameters: expected a JSON schema.")
    return {"type": "function", "function": dict(function)}


def _object(call: ToolCall, arguments: str) -> str:
    """As templates write it."""
    return f'{{"name": {json.dumps(call.name)}, "{arguments}": {json.dumps(call.arguments, ensure_ascii=False)}}}'


def _read_object(text: str, arguments: str) -> tuple[ToolCall, int] | None:
    """A call at the beginning of `text`, and where it ends."""
    start = len(text) - len(text.lstrip())
    try:
        value, end = json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    given = value.get(arguments, {})
    return (ToolCall(value["name"], given), end) if isinstance(given, dict) else None


def _bodies(tools: Sequence[Mapping[str, Any]], arguments: str) -> str:
    """The rule `body`: one of the tools, its arguments by its schema."""
    rules = []
    for at, tool in enumerate(tools):
        function = tool["function"]
        schema = dict(function.get("parameters") or {"type": "object"})
        whole: dict[str, Any] = {
            "type": "object",
            "properties": {"name": {"const": function["name"]}, arguments: schema},
            "required": ["name", arguments],
            "additionalProperties": False,
        }
        for shared in ("$defs", "definitions"):  # references are to the root, which is another now
            if shared in schema:
                whole[shared] = schema.pop(shared)
        rules.append(f"body_{at}: %json {json.dumps(whole)}")
    return "\n".join(["body: " + " | ".join(f"body_{at}" for at in range(len(tools))), *rules])
