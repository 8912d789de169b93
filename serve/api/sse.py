"""Server-sent events: one JSON value per event, an error as the last one where the answer broke off."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from lragent.serve.api.errors import as_api_error
from lragent.serve.api.generation import ClientGoneError, until_gone

DONE = b"data: [DONE]\n\n"
"""The last event of a whole answer."""

_LOG = logging.getLogger(__name__)


def event(value: Mapping[str, Any]) -> bytes:
    """One event. In ASCII, so that no client takes a character of the text for the end of a line."""
    return b"data: " + json.dumps(value, separators=(",", ":")).encode("ascii") + b"\n\n"


class EventStream(StreamingResponse):
    """Sends `events` as they come. The status waits for the first: what fails before it is an ordinary error answer.

    A later failure becomes an error event, without `[DONE]`. A client that goes closes `events`.
    """

    def __init__(self, events: AsyncGenerator[bytes, None], headers: Mapping[str, str]) -> None:
        own = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=own | dict(headers))
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_gone(receive, self._send_all(send))
        except ClientGoneError:
            return

    async def _send_all(self, send: Send) -> None:
        started = False
        async with aclosing(self._events):
            try:
                async for each in self._events:
                    if not started:
                        started = True
                        head = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
                        await send(head)
                    await send({"type": "http.response.body", "body": each, "more_body": True})
            except Exception as error:
                if not started:
                    raise
                if as_api_error(error).code == "internal_error":
                    _LOG.error("a stream broke off", exc_info=error)
                await send({"type": "http.response.body", "body": event(as_api_error(error).body), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
