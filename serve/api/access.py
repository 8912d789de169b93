"""Who asks: request ids, API keys, and one line in the log for each request."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lragent.errors import UserError
from lragent.serve.api.errors import ApiError

logger = logging.getLogger("lragent.access")

_GIVEN_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_KEY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_OPEN = re.compile(r"/health|/|/page/[a-z_]+\.(?:js|css)")
"""What needs no key: whether the server lives, and the page's own files, which hold no data."""
_UNPRINTABLE = re.compile(r"[^ -~]")
"""What could forge a line of the log."""
_LONGEST_PATH = 200
ADMIN = "admin"


@dataclass(frozen=True)
class Caller:
    """Who sent a request. key: the name of its API key, "" where none is asked for. admin: may see and change all."""

    request_id: str
    arrived: float
    """By `time.perf_counter`."""
    key: str
    admin: bool


@dataclass(frozen=True)
class _Key:
    name: str
    digest: bytes = field(repr=False)
    admin: bool


class ApiKeys:
    """The keys of one server. Secrets are kept as digests only.

    keys: each a secret, or `name=secret`; one without a name is called after its digest. admin_key: its holder may load
    roles and see everybody's figures; where there is none, every key's holder may. Raises UserError for a bad one.
    """

    def __init__(self, keys: Sequence[str], admin_key: str | None = None) -> None:
        self._keys = [_key(each, admin=admin_key is None) for each in keys]
        if admin_key is not None:
            self._keys.append(_Key(ADMIN, _digest(_secret(admin_key)), True))
        for what in ("name", "digest"):
            if len({getattr(key, what) for key in self._keys}) < len(self._keys):
                raise UserError("api_key: two keys have the same name or secret; each must differ.")

    def __bool__(self) -> bool:
        """Whether a key is asked for at all."""
        return bool(self._keys)

    def find(self, authorization: str) -> _Key | None:
        """The key in an `Authorization: Bearer …` header. Compares with all, so that time tells nothing."""
        scheme, _, secret = authorization.partition(" ")
        digest = _digest(secret.strip())
        found = None
        for key in self._keys:
            if hmac.compare_digest(key.digest, digest) and scheme.lower() == "bearer":
                found = key
        return found


def _key(text: str, *, admin: bool) -> _Key:
    name, equals, secret = text.partition("=")
    if not equals or not _KEY_NAME.fullmatch(name):
        name, secret = "", text
    digest = _digest(_secret(secret))
    return _Key(name or f"key-{digest.hex()[:8]}", digest, admin)


def _secret(text: str) -> str:
    if len(text) < 8 or not text.isascii() or not text.isprintable() or " " in text:
        raise UserError("api_key: must be at least 8 printable ASCII characters without spaces.")
    return text


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()


def caller_of(request: Request) -> Caller:
    """Who sent `request`."""
    caller: Caller = request.scope["lragent.caller"]
    return caller


def must_be_admin(request: Request) -> None:
    """Raise ApiError 403 unless the caller may see and change all."""
    if not caller_of(request).admin:
        raise ApiError(403, "This needs the server's admin key.", code="not_allowed")


class Access:
    """The outermost layer of the application."""

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self._app, self._keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        given = headers.get("x-request-id", "")
        request_id = given if _GIVEN_ID.fullmatch(given) else uuid.uuid4().hex
        arrived = time.perf_counter()
        key = self._keys.find(headers.get("authorization", "")) if self._keys else None
        name, admin = ("", True) if not self._keys else (key.name, key.admin) if key else ("", False)
        scope["lragent.caller"] = Caller(request_id, arrived, name, admin)
        status = 0

        async def told(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            if self._keys and key is None and not _OPEN.fullmatch(scope["path"]):
                await _unauthorized()(scope, receive, told)
            else:
                await self._app(scope, receive, told)
        finally:
            self._log(scope, status, name, request_id, time.perf_counter() - arrived)

    @staticmethod
    def _log(scope: Scope, status: int, key: str, request_id: str, seconds: float) -> None:
        facts = {
            "request_id": request_id,
            "method": scope["method"],
            "path": _UNPRINTABLE.sub("?", scope["path"])[:_LONGEST_PATH],
            "status": status,
            "ms": round(1e3 * seconds, 1),
            "key": key,
        }
        # Pages and probes that ask every second would bury the rest.
        quiet = scope["path"] in ("/health", "/metrics") or scope["path"].startswith("/page/")
        logger.log(logging.DEBUG if quiet else logging.INFO, "%(method)s %(path)s %(status)s", facts, extra=facts)


def _unauthorized() -> JSONResponse:
    error = ApiError(401, "Authorization: give this server's API key as `Bearer KEY`.", code="invalid_api_key")
    return JSONResponse(error.body, status_code=401, headers={"WWW-Authenticate": "Bearer"})
