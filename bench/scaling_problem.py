"""What training on several GPUs is measured on, as files: a random model with words for tokens, and conversations."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lragent.atomic import new_folder, write_file
from lragent.bench.shapes import random_model, shape_named
from lragent.bench.traces import sized_trace
from lragent.models.quiet import quiet_libraries

WORDS = 4096
"""At most so many different ones: a list of all that a vocabulary has room for takes long to load."""


def write_model(shape: str, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
    """Make a model of that shape on `device` and save it as the new folder `folder`, with a tokenizer.

    In several files, so that their digests can be remembered one by one. Raises UserError for an unknown shape, or
    where the folder cannot be written.
    """
    torch.manual_seed(0)
    known = shape_named(shape)
    with new_folder(folder) as place, quiet_libraries():
        random_model(known, device, dtype).save_pretrained(place, max_shard_size="2GB")
        word_tokenizer(min(WORDS, known.vocabulary)).save_pretrained(place)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the runs need the room


def word_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """`w1 w2 …` between spaces, one token each; id 0 is any other word, and the last id ends turns."""
    words = ["?", *(f"w{token}" for token in range(1, size - 1))]
    tokenizer = Tokenizer(models.WordLevel(vocab={word: at for at, word in enumerate(words)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", unk_token="?")


def write_conversations(path: Path, count: int, tokens: int, vocabulary: int) -> None:
    """`count` conversations of the paper's 17 steps over three roles, as rows of training data.

    tokens: of each, as `word_tokenizer` of `vocabulary` reads them in the renderer's plain form. Raises UserError where
    the file cannot be written.
    """
    words = min(WORDS, vocabulary) - 1
    rows = []
    for seed in range(count):
        source = random.Random(seed)
        messages = []
        for step in sized_trace(tokens):
            # A turn opens with two tokens and ends with one; the answer's opening counts as new.
            for role, length in (("user", step.new - 5), ("assistant", step.answer - 1)):
                content = " ".join(f"w{source.randrange(1, words)}" for _ in range(length))
                messages.append({"role": role, "content": content} | ({"name": step.role} if role != "user" else {}))
        rows.append(json.dumps({"messages": messages}) + "\n")
    write_file(path, "".join(rows).encode())
