"""Tool calls in answers: asked for by a grammar where they must be, read from the text where they may be."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lragent.chat_tools import ToolChoice, ToolForm
from lragent.serve.api.context import Context
from lragent.serve.api.generation import Answer
from lragent.serve.engine.grammar import Grammar
from lragent.serve.engine.types import Chunk, GenerationRequest, SamplingParams


def constrained(
    params: SamplingParams, form: ToolForm, tools: Sequence[Mapping[str, Any]], choice: ToolChoice, *, many: bool
) -> SamplingParams:
    """`params` of an answer that calls a tool where `choice` says that it must; several of them only if `many`."""
    if choice.mode != "required":
        return params
    chosen = [tool for tool in tools if choice.name in (None, tool["function"]["name"])]
    return replace(params, grammar=Grammar.lark(form.grammar(chosen, many=many and choice.name is None)))


@dataclass(frozen=True)
class Said:
    """What an answer says, as OpenAI's clients see it. content: None where there are calls alone."""

    content: str | None
    calls: list[dict[str, Any]]


def parse_calls(context: Context, form: ToolForm, generation: GenerationRequest, answer: Answer) -> Said:
    """Read the calls in `answer`. A client sends them back in its own form, which is remembered as these tokens too."""
    content, calls = form.read(answer.text)
    if not calls:
        return Said(answer.text, [])
    written = form.write(content, calls)
    if written != answer.text:
        context.service.chat.remember_as(generation.prompt, answer.text, written)
    listed = [
        {
            "id": f"call_{uuid.uuid4().hex[:24]}",
            "type": "function",
            "function": {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)},
        }
        for call in calls
    ]
    return Said(content or None, listed)


class CallStream:
    """An answer that may call, as it comes: what is certainly content goes out at once, calls when they are whole."""

    def __init__(self, form: ToolForm) -> None:
        self.form = form
        self.sent = 0
        """Characters that have gone out."""
        self._chunks: list[Chunk] = []
        self._text = ""

    def push(self, chunk: Chunk) -> str:
        """One more chunk; returns the content that is certain now."""
        self._chunks.append(chunk)
        self._text += chunk.text
        start, self.sent = self.sent, max(self.sent, self.form.certain(self._text))
        return self._text[start : self.sent]

    def whole(self, last: Chunk) -> Answer:
        """The answer, which `last` has ended."""
        assert last.finish_reason is not None
        assert last.usage is not None
        return Answer(
            self._text,
            tuple(token for chunk in self._chunks for token in chunk.token_ids),
            tuple(logprob for chunk in self._chunks for logprob in chunk.logprobs),
            last.finish_reason,
            last.usage,
        )
