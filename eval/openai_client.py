"""An OpenAI endpoint as a `Complete`: `model` names the role, numbers come from `usage` and from our own clock."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import httpx
import openai

from lragent.errors import UserError
from lragent.eval.agent import Complete, Message, OutOfContextError, Reply

CONTEXT_ERROR = "context_length_exceeded"
CONTEXT_WORDS = ("maximum context length", "maximum model length")
"""In the messages of vLLM, whose code is 400 whatever the fault."""


@contextmanager
def openai_endpoint(base_url: str, api_key: str) -> Iterator[Complete]:
    """An endpoint for the length of a block, without a proxy between. Raises UserError where it does not answer, or not
    as it should."""
    try:
        client = openai.OpenAI(
            base_url=base_url, api_key=api_key, http_client=openai.DefaultHttpxClient(trust_env=False)
        )
        with client:
            yield openai_complete(client)
    except openai.APIStatusError as error:
        raise UserError(f"{base_url}: refuses with status {error.status_code} ({_said(error)}).") from error
    # A server that ends in the middle of an answer is told of by httpx itself.
    except (openai.OpenAIError, httpx.HTTPError, httpx.InvalidURL) as error:
        raise UserError(
            f"{base_url}: does not answer ({error}); is the server there, and the address right?"
        ) from error


def _said(error: openai.APIStatusError) -> str:
    """The server's own sentence, if it said one."""
    body = error.body if isinstance(error.body, dict) else {}
    return str(body.get("message") or error.message)


def openai_complete(client: openai.OpenAI, *, extra_body: dict[str, Any] | None = None) -> Complete:
    """Generates greedily through `client.chat.completions`, streaming, so that the first token's time is seen.

    `extra_body` goes into each request (for example `trajectory_id`, `cache_salt`). Where the server reports no
    `usage.lragent`, computed tokens are prompt tokens less the cached ones, if it reports those. Raises the client's
    own errors, and `OutOfContextError` for a prompt that is too long.
    """

    def complete(role: str, messages: list[Message], max_tokens: int) -> Reply:
        start = time.perf_counter()
        try:
            stream = client.chat.completions.create(
                model=role,
                messages=cast(Any, messages),
                max_tokens=max_tokens,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
                extra_body=extra_body,
            )
        except openai.BadRequestError as error:
            if error.code == CONTEXT_ERROR or any(words in error.message.lower() for words in CONTEXT_WORDS):
                raise OutOfContextError(f"The trajectory no longer fits: {error.message}") from error
            raise
        pieces: list[str] = []
        first: float | None = None
        usage = None
        for chunk in stream:
            usage = chunk.usage or usage
            for choice in chunk.choices:
                if first is None and (choice.delta.content or choice.finish_reason):
                    first = time.perf_counter() - start
                pieces.append(choice.delta.content or "")
        numbers = _numbers(usage.model_dump()) if usage else {}
        return Reply("".join(pieces), ttft_s=first, total_s=time.perf_counter() - start, **numbers)

    return complete


def _numbers(usage: dict[str, Any]) -> dict[str, int | None]:
    """The token counts of `Reply` from a `usage` object."""
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
    ours = usage.get("lragent") or {}
    computed = None if cached is None else usage["prompt_tokens"] - cached
    return {
        "prompt_tokens": usage["prompt_tokens"],
        "generated_tokens": usage["completion_tokens"],
        "tokens_computed": ours.get("tokens_computed", computed),
        "tokens_reused": ours.get("base_reused", cached),
        "lr_reused": ours.get("lr_reused"),
    }
