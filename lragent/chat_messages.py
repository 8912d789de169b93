"""OpenAI-style messages, checked and reduced to what a turn is made of: who, what text, which author."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lragent.chat_tools import ToolForm, read_tool_calls
from lragent.errors import UserError

SPEAKERS = ("system", "user", "assistant", "tool")
"""The values of a message's `role` after `developer` became `system`. Not to be taken for LoRA roles."""


@dataclass(frozen=True)
class Turn:
    """One message: `speaker` is one of `SPEAKERS`; `author` the LoRA role in an assistant message's `name`, or None.

    `learnt` is False for an assistant message of OpenAI's `weight: 0`: said, but not to be imitated.
    """

    speaker: str
    text: str
    author: str | None
    learnt: bool = True


def read_messages(messages: Any, *, where: str = "messages", tools: ToolForm | None = None) -> list[Turn]:
    """Check `messages` and return them as turns.

    Content is a text or a list of `{"type": "text", "text": …}` parts, which are joined. Raises `UserError` that begins
    with the field, such as `messages[3].role`; `where` names the list itself. tools: how the model writes calls, where
    it does: those of an assistant's `tool_calls` become part of its text.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise UserError(f"{where}: expected a list of messages, found {_kind(messages)}.")
    if not messages:
        raise UserError(f"{where}: is empty; give at least one message.")
    return [_read_message(message, f"{where}[{at}]", tools) for at, message in enumerate(messages)]


def _read_message(message: Any, where: str, tools: ToolForm | None) -> Turn:
    if not isinstance(message, Mapping):
        raise UserError(f"{where}: expected a message with role and content, found {_kind(message)}.")
    speaker = message.get("role")
    if speaker == "developer":
        speaker = "system"
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        raise UserError(f"{where}.role: is {speaker!r}; use one of {', '.join(SPEAKERS)}.")
    if message.get("function_call"):
        raise UserError(f"{where}.function_call: is not supported; use tool_calls.")
    calls = []
    if message.get("tool_calls"):
        if tools is None or speaker != "assistant":
            raise UserError(f"{where}.tool_calls: is not supported here; write the call into the content.")
        calls = read_tool_calls(message["tool_calls"], f"{where}.tool_calls")
    author, weight = None, 1
    if speaker == "assistant":
        weight = message.get("weight", 1)
        if weight not in (0, 1):
            raise UserError(
                f"{where}.weight: is {weight!r}; use 1 to learn the message, 0 to leave it out of the loss."
            )
        author = message.get("name")
        if author is not None and (not isinstance(author, str) or not author):
            raise UserError(f"{where}.name: expected the name of a role, found {_kind(author)}.")
    content = message.get("content")
    text = "" if calls and content is None else _read_content(content, f"{where}.content")
    if calls and tools is not None:
        text = tools.write(text, calls)
    return Turn(speaker, text, author, learnt=bool(weight))


def _read_content(content: Any, where: str) -> str:
    if content is None:
        raise UserError(f"{where}: is missing; give a text or a list of text parts.")
    if isinstance(content, list | tuple):
        content = "".join(_read_part(part, f"{where}[{at}]") for at, part in enumerate(content))
    if not isinstance(content, str):
        raise UserError(f"{where}: expected a text or a list of text parts, found {_kind(content)}.")
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: holds half of a surrogate pair, so it is not valid Unicode text.") from error
    return content


def _read_part(part: Any, where: str) -> str:
    if not isinstance(part, Mapping):
        raise UserError(f'{where}: expected {{"type": "text", "text": …}}, found {_kind(part)}.')
    if part.get("type") != "text":
        raise UserError(f'{where}.type: is {part.get("type")!r}; only parts of type "text" are supported.')
    if not isinstance(part.get("text"), str):
        raise UserError(f"{where}.text: expected a text, found {_kind(part.get('text'))}.")
    return part["text"]


def _kind(value: Any) -> str:
    """Name what was found, briefly enough for an error."""
    if value is None:
        return "nothing"
    if value == "":
        return "an empty text"
    return {str: "a text", bool: "true or false", dict: "an object", list: "a list", tuple: "a list"}.get(
        type(value), "a number" if isinstance(value, int | float) else f"a {type(value).__name__}"
    )
