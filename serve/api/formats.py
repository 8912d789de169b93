"""`response_format` and its likes: what the text of an answer must match."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lragent.errors import UserError
from lragent.serve.api.errors import shown
from lragent.serve.engine.grammar import Grammar

ANY_OBJECT = {"type": "object"}
_KINDS = ("text", "json_object", "json_schema", "regex", "grammar")
_STRUCTURED = ("json", "regex", "choice", "grammar", "json_object")


def grammar_of_format(given: Any) -> Grammar | None:
    """The grammar of `response_format`: OpenAI's kinds, and `{"type": "regex", "pattern": …}` and `{"type": "grammar",
    "grammar": …}` (in Lark's notation) beside them. Raises UserError naming the part that is wrong."""
    if given is None:
        return None
    kind = given.get("type") if isinstance(given, Mapping) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return Grammar.json_schema(ANY_OBJECT)
    if kind == "json_schema":
        wrapped = given.get("json_schema")
        schema = wrapped.get("schema", True) if isinstance(wrapped, Mapping) else None
        if not isinstance(schema, Mapping | bool):
            raise UserError('response_format.json_schema: must be {"name": …, "schema": a JSON schema}.')
        return Grammar.json_schema(schema)
    if kind == "regex":
        return Grammar.regex(_text(given, "pattern", "response_format"))
    if kind == "grammar":
        return Grammar.lark(_text(given, "grammar", "response_format"))
    raise UserError(f"response_format.type: must be one of {', '.join(_KINDS)}, not {shown(kind)}.")


def grammar_of_structured(given: Any) -> Grammar | None:
    """The grammar of vLLM's `structured_outputs`: an object with one of `json`, `regex`, `choice`, `grammar`."""
    if given is None:
        return None
    named = [name for name in _STRUCTURED if isinstance(given, Mapping) and given.get(name) is not None]
    if len(named) != 1:
        raise UserError(f"structured_outputs: must be an object with one of {', '.join(_STRUCTURED)}.")
    (kind,) = named
    value = given[kind]
    if kind == "json":
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError as error:
                raise UserError(f"structured_outputs.json: is not valid JSON: {error}.") from None
        if not isinstance(value, Mapping | bool):
            raise UserError("structured_outputs.json: must be a JSON schema.")
        return Grammar.json_schema(value)
    if kind == "json_object":
        return Grammar.json_schema(ANY_OBJECT) if value is True else None
    if kind == "choice":
        if not isinstance(value, list) or not value or not all(isinstance(each, str) and each for each in value):
            raise UserError("structured_outputs.choice: must be a list of texts, none of them empty.")
        return Grammar.lark("start: " + " | ".join(json.dumps(each) for each in value))
    text = _text(given, kind, "structured_outputs")
    return Grammar.regex(text) if kind == "regex" else Grammar.lark(text)


def _text(given: Mapping[str, Any], name: str, where: str) -> str:
    value = given.get(name)
    if not isinstance(value, str) or not value:
        raise UserError(f"{where}.{name}: must be a text, not {shown(value)}.")
    return value
