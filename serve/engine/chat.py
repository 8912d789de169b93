"""From chat messages to a prompt: who speaks where, and which ids were generated before."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from lragent.chat import Renderer, position_roles
from lragent.chat_tools import ToolForm
from lragent.errors import UserError
from lragent.modes import PrefixWriter, SharingMode
from lragent.serve.engine.turns import ContextKeys, TurnMemory
from lragent.serve.engine.types import Prompt

TOOL_SETS = 32
"""Lists of tools whose renderers are kept."""


class ChatPrompts:
    """Prepares the prompts of one engine."""

    def __init__(
        self, renderer: Renderer, memory: TurnMemory, sharing: SharingMode, prefix_writer: PrefixWriter
    ) -> None:
        self._renderer = renderer
        self._memory = memory
        self._sharing = sharing
        self.prefix_writer = prefix_writer
        self._showing: OrderedDict[str, Renderer] = OrderedDict()

    def tool_form(self) -> ToolForm:
        """How this model's template writes tool calls. Raises UserError where it has no form that is known here."""
        form = self._renderer.tool_form
        if form is None:
            raise UserError(
                "tools: this model's chat template shows no tools, or writes calls in a form that is not known here "
                "(known are Hermes', which Qwen uses, and Llama 3's); leave `tools` out and describe them in a message."
            )
        return form

    def remember_as(self, prompt: Prompt, text: str, other: str) -> None:
        """The answer `text` to `prompt` may come back as `other`: it is the same tokens."""
        ids = None if prompt.key is None else self._memory.recall(prompt.key, text)
        if prompt.key is not None and ids is not None:
            self._memory.remember(prompt.key, other, tuple(ids))

    def _with_tools(self, tools: Sequence[Mapping[str, Any]]) -> Renderer:
        """The renderer that shows `tools`; the last ones are kept. Called by one thread at a time."""
        if not tools:
            return self._renderer
        name = json.dumps(tools, sort_keys=True)
        if name not in self._showing:
            self._showing[name] = self._renderer.with_tools(tools)
        self._showing.move_to_end(name)
        while len(self._showing) > TOOL_SETS:
            self._showing.popitem(last=False)
        return self._showing[name]

    def prepare(
        self, messages: Sequence[Mapping[str, Any]], role: str, salt: str, tools: Sequence[Mapping[str, Any]] = ()
    ) -> Prompt:
        """The prompt that asks `role` for the next turn. Raises UserError naming the message and field at fault."""
        keys = ContextKeys(salt)
        rendered = self._with_tools(tools).render(
            messages, ask=True, recall=lambda context, text: self._memory.recall(keys.of(context), text)
        )
        roles = None
        if self._sharing.one_writer_per_token:
            roles = tuple(position_roles(rendered, asker=role, prefix_writer=self.prefix_writer))
        start, end = rendered.openings[-1]
        return Prompt(
            rendered.token_ids,
            roles,
            opening=max(1, end - start),
            key=keys.of(rendered.token_ids),
            tool_spans=rendered.tool_spans,
        )
