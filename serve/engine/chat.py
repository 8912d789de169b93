"""From chat messages to a prompt: who speaks where, and which ids were generated before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lragent.chat import Renderer, position_roles
from lragent.modes import PrefixWriter, SharingMode
from lragent.serve.engine.turns import ContextKeys, TurnMemory
from lragent.serve.engine.types import Prompt


class ChatPrompts:
    """Prepares the prompts of one engine."""

    def __init__(
        self, renderer: Renderer, memory: TurnMemory, sharing: SharingMode, prefix_writer: PrefixWriter
    ) -> None:
        self._renderer = renderer
        self._memory = memory
        self._sharing = sharing
        self._prefix_writer = prefix_writer

    def prepare(self, messages: Sequence[Mapping[str, Any]], role: str, salt: str) -> Prompt:
        """The prompt that asks `role` for the next turn. Raises UserError naming the message and field at fault."""
        keys = ContextKeys(salt)
        rendered = self._renderer.render(
            messages, ask=True, recall=lambda context, text: self._memory.recall(keys.of(context), text)
        )
        roles = None
        if self._sharing.one_writer_per_token:
            roles = tuple(position_roles(rendered, asker=role, prefix_writer=self._prefix_writer))
        start, end = rendered.openings[-1]
        return Prompt(
            rendered.token_ids,
            roles,
            opening=max(1, end - start),
            key=keys.of(rendered.token_ids),
            tool_spans=rendered.tool_spans,
        )
