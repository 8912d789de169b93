"""The bytes of single tokens, for the kinds of vocabulary that models have."""

from __future__ import annotations

import pytest
from tiny import SPECIAL_TOKENS, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lragent.serve.engine.token_text import TokenText


@pytest.mark.parametrize("text", ["the inn and the stone", "é€😀\n\t\x00 ", bytes(range(32, 127)).decode()])
def test_byte_level_tokens_add_up_to_the_text(text: str) -> None:
    tokenizer = tiny_tokenizer()
    said = TokenText(tokenizer)
    assert b"".join(said.bytes_of(token) for token in tokenizer(text).input_ids) == text.encode()


def test_special_tokens_say_their_name_and_ids_beyond_the_vocabulary_nothing() -> None:
    said = TokenText(tiny_tokenizer())
    assert [said.bytes_of(token).decode() for token in range(3)] == list(SPECIAL_TOKENS)
    assert [said.is_special(token) for token in (0, 2, 3)] == [True, True, False]
    assert said.bytes_of(299) == b""


def test_a_vocabulary_of_characters_with_single_bytes() -> None:
    pieces = ["<unk>", "<0xE2>", "<0x0A>", "▁the", "▁", "Ġ", "é"]
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    said = TokenText(PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>"))
    assert [said.bytes_of(token) for token in range(7)] == [
        b"<unk>", b"\xe2", b"\n", b" the", b" ", "Ġ".encode(), "é".encode(),
    ]  # fmt: skip


def test_a_byte_level_vocabulary_without_a_token_for_every_byte() -> None:
    """As SmolLM2's: no valid text has 0xC0 or 0xFF."""
    vocab = {token: index for token, index in tiny_tokenizer().get_vocab().items() if token not in ("À", "ÿ")}
    numbered = {token: at for at, token in enumerate(sorted(vocab, key=vocab.__getitem__))}
    tokenizer = Tokenizer(models.BPE(vocab=numbered, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    said = TokenText(
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=list(SPECIAL_TOKENS))
    )
    ids = tokenizer.encode(" is é").ids
    assert b"".join(said.bytes_of(token) for token in ids) == " is é".encode()
