"""Every way in which a request can fail, as the body and status that OpenAI clients know."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from lragent.errors import UserError
from lragent.serve.engine.roles import RoleRoomError
from lragent.serve.engine.types import (
    EngineDeadError,
    NoReplicaError,
    QueueFullError,
    ReplicaLostError,
    UnknownRoleError,
)
from lragent.serve.ledger.budgets import OverBudgetError
from lragent.serve.ledger.ledger import LedgerFailingError

_FIELD = re.compile(r"([a-z]\w*(?:\[\d+\]|\.\w+)*): ")
_LONGEST_MESSAGE = 500
_QUEUE_RETRY_S = 1
_START_RETRY_S = 5


@dataclass
class ApiError(Exception):
    """A failure with its place in HTTP. `param` names the field at fault, `message` is one sentence."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`."""
        message = " ".join(self.message.split())
        if len(message) > _LONGEST_MESSAGE:
            message = message[:_LONGEST_MESSAGE] + "…"
        kind = _KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}


_KINDS = {429: "rate_limit_error", 503: "service_unavailable_error"}


def shown(value: Any) -> str:
    """`value` as an error message shows it: never long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def bad_request(message: str, *, code: str | None = None) -> ApiError:
    """A 400 whose `param` is the field that `message` begins with (`temperature: must be …`)."""
    named = _FIELD.match(message)
    return ApiError(400, message, param=named[1] if named else None, code=code)


def as_api_error(error: Exception) -> ApiError:
    """Find the status for `error`. What nobody raised on purpose is a 500 that tells the client nothing more."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UnknownRoleError):
        return ApiError(404, str(error), param="model", code="model_not_found")
    if isinstance(error, OverBudgetError):
        headers = {} if error.retry_s is None else {"Retry-After": str(error.retry_s)}
        return ApiError(429, str(error), code="over_budget", headers=headers)
    if isinstance(error, RoleRoomError):
        return ApiError(429, str(error), code="no_place", headers={"Retry-After": str(_QUEUE_RETRY_S)})
    if isinstance(error, LedgerFailingError):
        return ApiError(503, str(error), code="ledger_failing", headers={"Retry-After": "10"})
    if isinstance(error, UserError):
        return bad_request(str(error))
    if isinstance(error, QueueFullError):
        return ApiError(429, str(error), code="queue_full", headers={"Retry-After": str(_QUEUE_RETRY_S)})
    if isinstance(error, ReplicaLostError):
        return ApiError(503, str(error), code="replica_lost", headers={"Retry-After": str(_QUEUE_RETRY_S)})
    if isinstance(error, NoReplicaError):
        return ApiError(503, str(error), code="no_replica", headers={"Retry-After": str(_START_RETRY_S)})
    if isinstance(error, EngineDeadError):
        return ApiError(503, str(error), code="engine_dead")
    return ApiError(500, "The server failed on this request; its log says why.", code="internal_error")


async def answer_error(_request: Request, error: Exception) -> JSONResponse:
    """Starlette's handler for all that an endpoint raises."""
    known = as_api_error(error)
    return JSONResponse(known.body, status_code=known.status, headers=dict(known.headers))


async def answer_routing_error(request: Request, error: Exception) -> JSONResponse:
    """Starlette's handler for an unknown path or a wrong method."""
    assert isinstance(error, HTTPException)
    asked = f"{request.method} {request.url.path}"
    if error.status_code == 404:
        known = ApiError(404, f"{asked}: there is no such path here.", code="unknown_path")
    elif error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        known = ApiError(405, f"{asked}: this method is not allowed; use {allowed}.", code="method_not_allowed")
    else:
        known = ApiError(error.status_code, str(error.detail))
    return JSONResponse(known.body, status_code=known.status, headers=dict(error.headers or {}))
