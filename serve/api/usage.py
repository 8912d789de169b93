"""GET /v1/usage: what was used, by role, key and trajectory, out of the ledger."""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse

from lragent.errors import UserError
from lragent.serve.api.access import Caller, caller_of
from lragent.serve.api.context import Context
from lragent.serve.api.errors import ApiError
from lragent.serve.api.metering import budgets_body
from lragent.serve.api.openapi import answers
from lragent.serve.ledger.entry import GROUPS
from lragent.serve.ledger.ledger import Ledger
from lragent.serve.ledger.prices import in_units
from lragent.serve.ledger.store import Sums

_MOST = 1000
_FILTERS = ("role", "key", "trajectory", "run")
_PARAMETERS: list[dict[str, Any]] = [
    {"name": "group_by", "in": "query", "schema": {"type": "string", "enum": list(GROUPS)}},
    {"name": "since", "in": "query", "schema": {"type": "number"}, "description": "Unix time."},
    {"name": "until", "in": "query", "schema": {"type": "number"}, "description": "Unix time."},
    {"name": "limit", "in": "query", "schema": {"type": "integer", "minimum": 1, "maximum": _MOST}},
    *({"name": name, "in": "query", "schema": {"type": "string", "maxLength": 512}} for name in _FILTERS),
]


def usage_router(context: Context) -> APIRouter:
    """The endpoint, over `context`."""
    router = APIRouter()
    extra = {"parameters": _PARAMETERS} | answers(json={"type": "object"})

    @router.get("/v1/usage", response_model=None, openapi_extra=extra)
    async def get_usage(request: Request) -> JSONResponse:
        ledger = context.ledger
        if ledger is None:
            raise ApiError(404, "This server keeps no ledger; start it with --ledger FILE.", code="no_ledger")
        asked, caller = _query(request), caller_of(request)
        return JSONResponse(await asyncio.to_thread(_report, ledger, caller, asked))

    return router


def _query(request: Request) -> dict[str, Any]:
    """The parameters, checked. Raises UserError naming the one that is wrong."""
    known = {parameter["name"] for parameter in _PARAMETERS}
    asked: dict[str, Any] = {}
    for name, text in request.query_params.multi_items():
        if name not in known:
            raise UserError(f"{_shown(name)}: is no parameter here; there are {', '.join(sorted(known))}.")
        if name in asked:
            raise UserError(f"{name}: is given twice.")
        asked[name] = text
    for name, kind in (("since", float), ("until", float), ("limit", int)):
        if name in asked:
            try:
                asked[name] = kind(asked[name])
            except ValueError:
                raise UserError(f"{name}: must be a number.") from None
            if not 0 <= asked[name] < 1e12:
                raise UserError(f"{name}: must be a number from 0 on.")
    if not 1 <= asked.get("limit", 1) <= _MOST:
        raise UserError(f"limit: must be 1 to {_MOST}.")
    if asked.get("group_by", "role") not in GROUPS:
        raise UserError(f"group_by: must be one of {', '.join(GROUPS)}.")
    for name in _FILTERS:
        if len(asked.get(name, "")) > 512:
            raise UserError(f"{name}: is longer than 512 characters.")
    return asked


def _shown(name: str) -> str:
    return "".join(letter for letter in name if letter.isalnum())[:40] or "a parameter"


def _report(ledger: Ledger, caller: Caller, asked: dict[str, Any]) -> dict[str, Any]:
    where = {name: asked[name] for name in _FILTERS if name in asked}
    if where.get("run") == "current":
        where["run"] = ledger.run
    if not caller.admin:
        where["key"] = caller.key
    times = {"since": asked.get("since", 0.0), "until": asked.get("until")}
    ledger.store.flush()
    report: dict[str, Any] = {
        "object": "lragent.usage",
        "created": int(time.time()),
        "run": ledger.run,
        "unit": ledger.prices.unit,
        "prices": asdict(ledger.prices),
        "total": sums_body(ledger.store.sums(where=where, **times)),
    }
    if "group_by" in asked:
        groups = ledger.store.groups(asked["group_by"], where=where, limit=asked.get("limit", 100), **times)
        report["groups"] = [{"name": each.name} | sums_body(each) for each in groups]
    budgets = ledger.budgets.all()
    if not caller.admin:
        budgets = [each for each in budgets if each.budget.scope == "key" and each.name == caller.key]
    report["budgets"] = budgets_body(budgets)
    return report


def sums_body(sums: Sums) -> dict[str, Any]:
    """Sums as JSON; `cost` in units."""
    return {"requests": sums.requests} | sums.values | {"cost": in_units(sums.values["cost"])}
