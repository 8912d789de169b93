"""From generated ids to text, piece by piece, without ever sending half a character or part of a stop string."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from lragent.serve.engine.types import SamplingParams

REPLACEMENT = "\ufffd"
"""What decoding yields for bytes that are not (yet) a character."""


MOST_HELD = 8
"""Tokens that may wait for the rest of a character; a character has at most four bytes, each a token at worst."""


class Detokenizer:
    """The text of one answer.

    Tokens are decoded in a window that begins a few tokens back, since what a token says can depend on the one before.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, params: SamplingParams) -> None:
        self._tokenizer = tokenizer
        self._stop, self._include_stop = params.stop, params.include_stop
        self._skip_special = params.skip_special_tokens
        self._ids: list[int] = []
        self._window = 0
        self._decoded = 0
        self.text = ""
        """All text so far, without a stop string unless it is to be included."""
        self._sent = 0
        self.stopped = False
        """Whether a stop string was met."""

    def push(self, token: int) -> str:
        """Take one more token; returns the text that is certain now."""
        self._ids.append(token)
        before = self._decode(self._window, self._decoded)
        after = self._decode(self._window, len(self._ids))
        end = len(self._ids)
        if after.endswith(REPLACEMENT):
            if end - self._decoded <= MOST_HELD:
                return ""
            # No character is that long: all but the last few tokens say what they will always say.
            cuts = range(end - 1, end - MOST_HELD, -1)
            end = next((cut for cut in cuts if self._decode(self._window, cut) + self._decode(cut, end) == after), end)
            after = self._decode(self._window, end)
        self._window, self._decoded = self._decoded, end
        return self._add(after[len(before) :])

    def finish(self) -> str:
        """The answer has ended: returns all text that was held back."""
        sent = self._sent
        if not self.stopped:
            before = self._decode(self._window, self._decoded)
            self._add(self._decode(self._window, len(self._ids))[len(before) :])
        self._sent = len(self.text)
        return self.text[sent:]

    def _decode(self, start: int, end: int) -> str:
        text: str = self._tokenizer.decode(
            self._ids[start:end], skip_special_tokens=self._skip_special, clean_up_tokenization_spaces=False
        )
        return text

    def _add(self, piece: str) -> str:
        searched = max(0, len(self.text) - max((len(stop) for stop in self._stop), default=0))
        self.text += piece
        found = [(at, stop) for stop in self._stop if (at := self.text.find(stop, searched)) >= 0]
        if found:
            at, stop = min(found)
            self.text = self.text[: at + len(stop) if self._include_stop else at]
            self.stopped = True
        safe = len(self.text) if self.stopped else len(self.text) - self._could_begin_stop()
        sent, self._sent = self._sent, max(self._sent, safe)
        return self.text[sent : self._sent]

    def _could_begin_stop(self) -> int:
        """How many of the last characters might be the beginning of a stop string."""
        longest = 0
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(self.text)), longest, -1):
                if self.text.endswith(stop[:length]):
                    longest = length
                    break
        return longest
