"""Log-probabilities in the shapes of OpenAI's two endpoints."""

from __future__ import annotations

import codecs
import math
from collections.abc import Sequence
from typing import Any

from lragent.serve.engine.token_text import TokenText
from lragent.serve.engine.types import TokenLogprob

_LEAST = -9999.0
"""What OpenAI reports for the least likely tokens: JSON has no infinity."""


def chat_logprobs(text: TokenText, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
    """`choices[i].logprobs` of a chat completion, or of a chunk of one."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        said = text.bytes_of(token)
        return {"token": said.decode("utf-8", "replace"), "logprob": _finite(logprob), "bytes": list(said)}

    content = [
        entry(each.token_id, each.logprob) | {"top_logprobs": [entry(*other) for other in each.top]}
        for each in logprobs
    ]
    return {"content": content, "refusal": None}


class CompletionLogprobs:
    """`choices[i].logprobs` of one completion, whole or chunk by chunk.

    Each token's alternatives hold the token itself too. Parts of characters are written as `bytes:\\xe2\\x82`, as
    OpenAI does. `text_offset` counts characters of the answer up to the one that the token ends or is part of.
    """

    def __init__(self, text: TokenText) -> None:
        self._text = text
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def body(self, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        """Of the tokens that come next."""
        offsets = []
        for each in logprobs:
            offsets.append(self._offset)
            if not self._text.is_special(each.token_id):
                self._offset += len(self._decoder.decode(self._text.bytes_of(each.token_id)))
        return {
            "tokens": [self._name(each.token_id) for each in logprobs],
            "token_logprobs": [_finite(each.logprob) for each in logprobs],
            "top_logprobs": [self._alternatives(each) for each in logprobs],
            "text_offset": offsets,
        }

    def _alternatives(self, each: TokenLogprob) -> dict[str, float]:
        """Where two ids have one name, the likelier of them counts; the token drawn is always there."""
        named: dict[str, float] = {}
        for token, logprob in (*each.top, (each.token_id, each.logprob)):
            named.setdefault(self._name(token), _finite(logprob))
        return named

    def _name(self, token: int) -> str:
        said = self._text.bytes_of(token)
        try:
            return said.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in said)


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else _LEAST
