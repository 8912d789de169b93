"""A conversation with the roles of a running server, over OpenAI's API: what was said, and who says what comes next."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

from lragent.errors import UserError

if TYPE_CHECKING:
    import openai

Message = dict[str, str]
"""An OpenAI message; an assistant's has the role that spoke in `name`, where the server gave it."""


class Conversation:
    """Messages, and the way back. An entry is what one line of the user's added: a message, and the answer to it."""

    def __init__(self, system: str | None = None) -> None:
        self.messages: list[Message] = [{"role": "system", "content": system}] if system else []
        self._entries: list[int] = []

    def begin(self) -> None:
        """From here on what is added is a new entry."""
        self._entries.append(len(self.messages))

    def add(self, role: str, content: str, name: str | None = None) -> None:
        self.messages.append({"role": role, "content": content} | ({"name": name} if name else {}))

    def undo(self) -> bool:
        """Takes the last entry back; False where there is none."""
        if not self._entries:
            return False
        del self.messages[self._entries.pop() :]
        return True


@dataclass(frozen=True)
class Options:
    """What goes into every request. None: as the server has it."""

    max_tokens: int | None = None
    temperature: float | None = None
    trajectory_id: str | None = None

    def as_arguments(self) -> dict[str, Any]:
        given = {"max_tokens": self.max_tokens, "temperature": self.temperature}
        arguments: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        if self.trajectory_id is not None:
            arguments["extra_body"] = {"trajectory_id": self.trajectory_id}
        return arguments


@dataclass
class Answer:
    """What a role said, and what the server tells of it."""

    text: str = ""
    name: str | None = None
    """Who spoke, in the server's words; it goes back with the message."""
    first_s: float | None = None
    """Seconds until the first piece of text."""
    usage: dict[str, Any] = field(default_factory=dict)
    stopped: bool = False
    """By the user."""

    def cost(self) -> str:
        """Tokens of the prompt and the time to the first of the answer, in words; what is not known is left out."""
        cached = (self.usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        ours = self.usage.get("lragent") or {}
        computed = ours.get("tokens_computed", self.usage.get("prompt_tokens", 0) - (cached or 0))
        parts = ["stopped"] if self.stopped else []
        if self.usage:
            parts.append(f"{computed:,} tokens computed" + ("" if cached is None else f", {cached:,} reused"))
        if ours.get("lr_prefilled"):
            parts.append(f"{ours['lr_prefilled']:,} by LR prefill")
        if self.first_s is not None:
            parts.append(f"{self.first_s:.2f} s to the first token")
        return " · ".join(parts)


class Team:
    """The roles of a running server. Whatever the server refuses or fails at is a `UserError` of one sentence."""

    def __init__(self, base_url: str, api_key: str, options: Options) -> None:
        """Asks no server yet. Raises `UserError` where `base_url` is none."""
        import openai

        self._base_url, self._options = base_url, options
        try:
            parts = urlsplit(base_url)
            host = parts.hostname if parts.scheme in ("http", "https") else None
            if not host or parts.port == 0:
                raise ValueError
        except ValueError:
            raise UserError(
                f"--base-url: {base_url!r} is not the address of a server, such as http://127.0.0.1:8000/v1."
            ) from None
        here = host == "localhost" or host.startswith("127.") or host == "::1"
        self._client = openai.OpenAI(
            base_url=base_url,
            api_key=api_key,
            http_client=openai.DefaultHttpxClient(trust_env=not here),  # no proxy leads to this machine
        )

    def roles(self) -> tuple[list[str], str]:
        """All names that the server lists, and the first role among them: of models without a parent, the first."""
        models = self._asked(lambda: list(self._client.with_options(max_retries=0).models.list()))
        if not models:
            raise UserError(f"the server at {self._base_url} serves no models.")
        adapted = [model.id for model in models if (model.model_extra or {}).get("parent")]
        return [model.id for model in models], (adapted or [models[0].id])[0]

    def check(self, role: str) -> None:
        """Raises `UserError` where the server does not know `role` (which may be a name that it does not list)."""
        self._asked(lambda: self._client.models.retrieve(role))

    def ask(self, role: str, messages: list[Message], show: Callable[[str], None]) -> Answer:
        """What `role` says after `messages`; `show` is given the text piece by piece. Ctrl-C stops the answer."""
        answer = Answer()
        try:
            self._asked(lambda: self._hear(role, messages, show, answer))
        except KeyboardInterrupt:
            answer.stopped = True
        return answer

    def _hear(self, role: str, messages: list[Message], show: Callable[[str], None], answer: Answer) -> None:
        """Fills `answer` as it comes. Leaving early closes the connection, and with it the server's work ends."""
        start = time.perf_counter()
        stream = self._client.chat.completions.create(
            model=role,
            messages=cast(Any, messages),
            stream=True,
            stream_options={"include_usage": True},
            **self._options.as_arguments(),
        )
        with stream:
            for chunk in stream:
                if chunk.usage:
                    answer.usage = chunk.usage.model_dump()
                for choice in chunk.choices[:1]:
                    answer.name = (choice.delta.model_extra or {}).get("name") or answer.name
                    if choice.delta.content:
                        if answer.first_s is None:
                            answer.first_s = time.perf_counter() - start
                        answer.text += choice.delta.content
                        show(choice.delta.content)

    def _asked(self, call: Callable[[], Any]) -> Any:
        import httpx
        import openai

        try:
            return call()
        except openai.OpenAIError as error:
            raise UserError(self._explain(error)) from error
        except httpx.HTTPError as error:  # a stream that breaks off
            raise UserError(f"the server at {self._base_url} broke off ({error}).") from error

    def _explain(self, error: openai.OpenAIError) -> str:
        """One sentence that names the mend, or the server's own."""
        import openai

        if isinstance(error, openai.APITimeoutError):
            return f"the server at {self._base_url} takes too long to answer; see whether it is at work."
        if isinstance(error, openai.APIConnectionError):
            return (
                f"no server answers at {self._base_url}; start one with `lragent serve`, or name another by --base-url."
            )
        if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
            return f"the server at {self._base_url} does not accept the key; give one by --api-key or LRAGENT_API_KEY."
        body = getattr(error, "body", None)
        said = body.get("message") if isinstance(body, dict) else None
        code = body.get("code") if isinstance(body, dict) else None
        if isinstance(error, openai.NotFoundError) and (not said or code == "unknown_path"):
            return f"{self._base_url} is no OpenAI endpoint; such addresses mostly end in /v1: see --base-url."
        return " ".join(str(said or error).split())
