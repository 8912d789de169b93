"""What an answer's text must match: a JSON schema, a regular expression, or a grammar in Lark's notation.

Compiled, and turned into masks over the vocabulary, by llguidance, whose work is bounded by its own limits.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import llguidance
import numpy as np
import numpy.typing as npt
from llguidance.hf import from_tokenizer
from transformers import PreTrainedTokenizerBase

from lragent.errors import UserError

Bits = npt.NDArray[np.int32]
"""[ceil(vocab / 32)]: a bit per token of the vocabulary, the lowest first."""

LONGEST = 256 * 1024
"""Characters of a grammar."""
KEPT = 64
"""Compiled grammars that are kept for the next request with the same one."""
_JSON_OPTIONS = {"whitespace_flexible": True, "whitespace_pattern": r"[\x20\x0A\x0D\x09]{0,32}"}
"""Between JSON's parts; bounded, since small models write spaces for ever where they may."""


@dataclass(frozen=True)
class Grammar:
    """What the text of an answer must match. `source` is llguidance's form of it; make one by the class's functions."""

    source: str

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | bool) -> Grammar:
        """JSON that is valid by `schema`, such as `{"type": "object"}`. Raises UserError for no schema at all."""
        try:
            source = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_JSON_OPTIONS)
        except (TypeError, ValueError) as error:
            raise UserError(f"json_schema: is no JSON schema: {_line(error)}.") from None
        return cls(source)

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        """Text that the regular expression matches as a whole. Look-around and back-references are not known."""
        return cls(llguidance.LLMatcher.grammar_from_regex(pattern))

    @classmethod
    def lark(cls, rules: str) -> Grammar:
        """Text that the rule `start` of a context-free grammar yields."""
        return cls(llguidance.LLMatcher.grammar_from_lark(rules))


class Matcher:
    """Where one answer stands in its grammar."""

    def __init__(self, matcher: llguidance.LLMatcher) -> None:
        self._matcher = matcher

    def fresh(self) -> Matcher:
        """The same grammar at its beginning."""
        return Matcher(self._matcher.deep_copy())

    def allow(self, bits: Bits) -> None:
        """Write into `bits` which tokens may come next. Raises UserError where that takes too much work."""
        self._matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        self._check()

    def take(self, token: int) -> None:
        """The answer goes on with `token`. Raises UserError as `allow`, and where the token is not allowed."""
        self._matcher.consume_token(token)
        self._check()

    @property
    def ended(self) -> bool:
        """Whether the text is complete, and nothing can follow."""
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise UserError(f"grammar: {_line(self._matcher.get_error())}.")


class Grammars:
    """Compiles grammars for one tokenizer, and keeps the last ones. May be used from any thread."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, end_tokens: frozenset[int]) -> None:
        self._given = tokenizer, vocab_size, end_tokens
        self._words = (vocab_size + 31) // 32
        self._vocabulary: llguidance.LLTokenizer | None = None
        self._kept: OrderedDict[Grammar, Matcher] = OrderedDict()
        self._lock = threading.Lock()

    def matcher(self, grammar: Grammar) -> Matcher:
        """`grammar` at its beginning. Compiling takes milliseconds, for huge ones a tenth of a second.

        Raises UserError where it is none, asks for what cannot be done, or would take too much work.
        """
        with self._lock:
            if grammar in self._kept:
                self._kept.move_to_end(grammar)
                return self._kept[grammar].fresh()
            vocabulary = self._tokens()
        if len(grammar.source) > LONGEST:
            raise UserError(f"grammar: takes more than {LONGEST} characters.")
        matcher = Matcher(llguidance.LLMatcher(vocabulary, grammar.source, log_level=0))
        matcher._check()
        matcher.fresh().allow(np.zeros(self._words, np.int32))  # some faults show at the first token only
        with self._lock:
            self._kept[grammar] = matcher
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return matcher.fresh()

    def _tokens(self) -> llguidance.LLTokenizer:
        """Made when it is first needed: it takes half a second, and most engines never need it."""
        if self._vocabulary is None:
            tokenizer, vocab_size, end_tokens = self._given
            size = max(vocab_size, len(tokenizer))
            self._vocabulary = from_tokenizer(tokenizer, n_vocab=size, eos_token=sorted(end_tokens))
            self._words = (size + 31) // 32
        return self._vocabulary


def _line(error: object) -> str:
    """The first line of what a library says, without its full stop."""
    return str(error).strip().split("\n<state>")[0].strip().replace("\n", " ").rstrip(".")
