"""What a single token says, as bytes: a character may be spread over several tokens."""

from __future__ import annotations

import re

from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerBase

_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")
"""A byte, in vocabularies that are made of characters."""


class TokenText:
    """The bytes of every token of a tokenizer, read once: may be asked from any thread.

    Byte-level vocabularies spell each byte as a character of their own; those made of characters write spaces as "▁"
    and have tokens for single bytes. Tokens that were added to either, the special ones among them, say what they are
    called.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        vocab: dict[str, int] = tokenizer.get_vocab()
        added = {index: str(token) for index, token in tokenizer.added_tokens_decoder.items()}
        self._special = frozenset(tokenizer.all_special_ids)
        of_char = _byte_of_char()
        # Not every byte need have a token: some are in no text that is valid.
        own = [token for token, index in vocab.items() if index not in added]
        falls_back = any(_FALLBACK.fullmatch(token) for token in own)
        spelled = of_char if not falls_back and set().union(*own) <= of_char.keys() else None
        self._bytes = {
            index: added[index].encode() if index in added else _bytes_of(token, spelled)
            for token, index in vocab.items()
        }

    def bytes_of(self, token: int) -> bytes:
        """Of an id that the model has and the tokenizer has not: none."""
        return self._bytes.get(token, b"")

    def is_special(self, token: int) -> bool:
        """Whether an answer's text leaves it out."""
        return token in self._special


def _byte_of_char() -> dict[str, int]:
    """The character by which byte-level vocabularies spell each byte.

    Printable ones stand for themselves, the others, in order, for the characters from 256 on (GPT-2's way).
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    themselves = {char: ord(char) for char in alphabet if ord(char) < 256}
    others = [byte for byte in range(256) if byte not in themselves.values()]
    return themselves | dict(zip(sorted(set(alphabet) - set(themselves)), others, strict=True))


def _bytes_of(token: str, spelled: dict[str, int] | None) -> bytes:
    if spelled is not None and all(char in spelled for char in token):
        return bytes(spelled[char] for char in token)
    byte = _FALLBACK.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()
