"""A request's body: read within its limit, as JSON that is safe to walk."""

from __future__ import annotations

import json
import re
from typing import Any

from starlette.requests import Request

from lragent.serve.api.errors import ApiError, bad_request

_DEEPEST = 64
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
_DISCARDED = 4
"""Bodies up to this many times the limit are read and thrown away, so that the client sees the answer, not a reset."""


async def read_json(request: Request, limit: int) -> dict[str, Any]:
    """Return the body, at most `limit` bytes, as a JSON object.

    Raises ApiError 413 for a larger body, else 400: a content type that is not JSON, text that is not UTF-8, broken or
    too deep JSON, half a surrogate pair, and anything but an object. NaN and Infinity pass: the field they stand in is
    named by whoever checks it.
    """
    media_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise ApiError(400, f"Content-Type: must be application/json, not {media_type!r}.", code="wrong_content_type")
    raw = await _read(request, limit)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise bad_request(f"The body is not UTF-8 text (byte {error.start}).", code="invalid_json") from None
    try:
        value = json.loads(text)
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:
        raise bad_request(f"The body is not valid JSON: {error}.", code="invalid_json") from None
    if not isinstance(value, dict):
        raise bad_request("The body must be a JSON object.", code="invalid_json")
    _check_depth(value)
    if _SURROGATE_ESCAPE.search(text):
        _check_surrogates(value)
    return value


async def _read(request: Request, limit: int) -> bytes:
    """Count while reading: the header may lie or be missing."""
    body = bytearray()
    size = 0
    async for piece in request.stream():
        size += len(piece)
        if size <= limit:
            body += piece
        elif size > _DISCARDED * limit:
            break
    if size > limit:
        raise ApiError(413, f"The body is larger than {limit} bytes; send less.", code="body_too_large")
    return bytes(body)


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(_DEEPEST):
        items = [item for each in level for item in (each.values() if type(each) is dict else each)]
        level = [item for item in items if type(item) is dict or type(item) is list]
        if not level:
            return
    raise _too_deep()


def _too_deep() -> ApiError:
    return bad_request(f"The body is nested deeper than {_DEEPEST} levels.", code="invalid_json")


def _check_surrogates(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise bad_request("The body holds half of a UTF-16 surrogate pair.", code="invalid_json") from None
