"""Rows of training data, checked: trajectories of several roles, and TRL's prompt/completion rows of one role.

Pure functions on one row; reading files is `lragent.train.data`'s. Every error begins with where the row stands
("file:line"), then the field.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from lragent.chat import Rendered, Renderer
from lragent.chat_messages import read_messages
from lragent.errors import UserError


@dataclass(frozen=True)
class Trajectory:
    """A conversation whose assistant messages are authored by the role in their `name`; without one, by nobody."""

    source: str
    messages: tuple[Mapping[str, Any], ...]
    per_role_only: bool
    """Whether one role's step is all there is to learn from it: a prompt/completion row."""

    def render(self, renderer: Renderer) -> Rendered:
        """Render the whole conversation."""
        return renderer.render(self.messages)


@dataclass(frozen=True)
class TextCompletion:
    """A plain text and how `role` goes on from it; no turns, as in a request to the completions endpoint."""

    source: str
    prompt: str
    completion: str
    role: str
    per_role_only: bool = True

    def render(self, renderer: Renderer) -> Rendered:
        """Render prompt, completion and the token that ends it."""
        return renderer.render_text(self.prompt, self.completion, author=self.role)


def parse_row(line: str, *, source: str) -> Any:
    """Read one line of JSONL."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source}: is not a line of JSON ({error}).") from error


def read_row(row: Any, roles: Collection[str], *, source: str) -> Trajectory | TextCompletion:
    """Check one row against the names of the `roles` that are trained.

    Takes `{"messages": […]}`, where every assistant message names its role, or `{"prompt", "completion", "role"}`
    with two texts or two lists of messages, where only the completion is learnt.
    """
    if not isinstance(row, Mapping):
        raise UserError(f"{source}: expected an object with `messages`, or with `prompt`, `completion` and `role`.")
    if row.get("messages") is not None:
        _refuse_both(row, source)
        messages = _named(row["messages"], roles, f"{source}: messages")
        return Trajectory(source, messages, per_role_only=False)
    missing = [field for field in ("prompt", "completion", "role") if row.get(field) is None]
    if missing:
        found = ", ".join(sorted(map(str, row))) or "nothing"
        raise UserError(
            f"{source}: {missing[0]}: is missing; a row has `messages`, or `prompt`, `completion` and `role` "
            f"(found: {found})."
        )
    return _read_prompt_completion(row["prompt"], row["completion"], row["role"], roles, source)


def _refuse_both(row: Mapping[str, Any], source: str) -> None:
    for field in ("prompt", "completion"):
        if row.get(field) is not None:
            raise UserError(f"{source}: {field}: stands beside `messages`; keep one of them.")


def _read_prompt_completion(
    prompt: Any, completion: Any, role: Any, roles: Collection[str], source: str
) -> Trajectory | TextCompletion:
    _check_role(role, roles, f"{source}: role")
    if isinstance(prompt, str) and isinstance(completion, str):
        for field, text in (("prompt", prompt), ("completion", completion)):
            read_messages([{"role": "user", "content": text}], where=f"{source}: {field}")
        return TextCompletion(source, prompt, completion, role)
    if isinstance(prompt, str) or isinstance(completion, str):
        raise UserError(f"{source}: completion: give `prompt` and `completion` both as texts, or both as messages.")
    read_messages(prompt, where=f"{source}: prompt")
    read_messages(completion, where=f"{source}: completion")
    # What the prompt's assistants said is context here, not theirs to be learnt.
    context = [{**message, "name": None} for message in prompt]
    learnt = []
    for at, message in enumerate(completion):
        if message["role"] == "assistant":
            name = message.get("name") or role
            if name != role:
                raise UserError(f"{source}: completion[{at}].name: is {name!r}, but the row's role is {role!r}.")
            message = {**message, "name": role}
        learnt.append(message)
    return Trajectory(source, (*context, *learnt), per_role_only=True)


def _named(messages: Any, roles: Collection[str], where: str) -> tuple[Mapping[str, Any], ...]:
    """Check that every assistant message names one of `roles`."""
    for at, turn in enumerate(read_messages(messages, where=where)):
        if turn.speaker == "assistant":
            _check_role(turn.author, roles, f"{where}[{at}].name")
    return tuple(messages)


def _check_role(name: Any, roles: Collection[str], where: str) -> None:
    if name is None:
        raise UserError(f"{where}: is missing; name the role that wrote it ({', '.join(roles)}).")
    if not isinstance(name, str) or name not in roles:
        raise UserError(f"{where}: {name!r} is not one of the roles that are trained ({', '.join(roles)}).")
