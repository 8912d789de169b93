"""The page at /: its files, and what it shows, as JSON."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, defaultdict
from dataclasses import asdict
from importlib.resources import files
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

import lragent
from lragent.serve.api.access import must_be_admin
from lragent.serve.api.context import Context
from lragent.serve.api.errors import ApiError
from lragent.serve.api.metrics import Histogram
from lragent.serve.api.usage import sums_body
from lragent.serve.cache.view import CacheView
from lragent.serve.ledger.entry import GROUPS
from lragent.serve.ledger.ledger import Ledger

_KINDS = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
MOST_NODES = 400
_FRESH_S = 0.5
"""So long one look at the engine serves everybody who watches."""
_LEDGER_FRESH_S = 1.0
_ROWS = 50


def page_router(context: Context) -> APIRouter:
    """The page, over `context`."""
    router = APIRouter()
    state = _State(context)

    @router.get("/", include_in_schema=False)
    async def index() -> Response:
        return _file("index.html")

    @router.get("/page/state.json", include_in_schema=False)
    async def get_state(request: Request) -> JSONResponse:
        must_be_admin(request)
        return JSONResponse(await state.now())

    @router.get("/page/{name}", include_in_schema=False)
    async def asset(name: str) -> Response:
        return _file(name)

    return router


def _file(name: str) -> Response:
    found = {each.name: each for each in files("lragent.serve.api").joinpath("page").iterdir()}
    kind = _KINDS.get(name.rpartition(".")[2])
    if kind is None or name not in found:
        raise ApiError(404, "There is no such file here.", code="unknown_path")
    return Response(found[name].read_bytes(), media_type=kind, headers=_HEADERS)


class _State:
    """What the page is told."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._lock = asyncio.Lock()
        self._last: tuple[float, dict[str, Any]] | None = None
        self._ledger: tuple[float, dict[str, Any]] | None = None
        """When it is to be looked at again, and what it said."""
        self._times: defaultdict[int, OrderedDict[int, float]] = defaultdict(OrderedDict)
        """By engine: the cache's time, and when it was so."""

    async def now(self) -> dict[str, Any]:
        """Not older than `_FRESH_S`."""
        async with self._lock:
            if self._last is None or time.monotonic() - self._last[0] > _FRESH_S:
                self._last = (time.monotonic(), await self._look())
            return self._last[1]

    async def _look(self) -> dict[str, Any]:
        service, latencies = self._context.service, self._context.latencies
        stats = service.stats()
        cache: dict[str, Any] = {"truncated": False, "nodes": []}
        if service.alive:
            views = await service.views(MOST_NODES)
            for at, view in enumerate(views):
                of_one = self._cache(at, len(views), *view)
                cache = {"truncated": cache["truncated"] or of_one["truncated"]} | {
                    "nodes": cache["nodes"] + of_one["nodes"]
                }
        roles = []
        for card in service.roles:
            name = card.name if card.parent is not None else "base"
            sums = stats.roles.get(name)
            roles.append(
                {
                    "name": name,
                    "parent": card.parent,
                    "digest": card.digest,
                    "running": stats.running_roles.get(name, 0),
                    "requests": sums.finished if sums else 0,
                }
                | {
                    field: getattr(sums, field) if sums else 0
                    for field in ("prompt_tokens", "tokens_computed", "base_reused", "lr_reused", "generated")
                }
            )
        ledger = self._context.ledger
        return {
            "model": service.model_name,
            "sharing": str(service.sharing),
            "prefix_writer": str(service.prefix_writer),
            "device": service.device,
            "version": lragent.__version__,
            "uptime_s": time.time() - self._context.created,
            "max_model_len": service.max_model_len,
            "alive": service.alive,
            "roles": roles,
            "totals": {
                "requests": stats.finished,
                "running": stats.running,
                "waiting": stats.waiting,
                "preempted": stats.preempted,
                "prompt_tokens": stats.prompt_tokens,
                "tokens_computed": stats.tokens_computed,
                "base_reused": stats.base_reused,
                "lr_reused": stats.lr_reused,
                "lr_prefilled": stats.lr_prefilled,
                "generated": stats.drawn,
            },
            "ttft_ms": _percentiles(latencies.first_token),
            "inter_token_ms": _percentiles(latencies.between_tokens),
            "cache": {
                "slots_total": stats.slots_total,
                "slots_used": stats.slots_used,
                "slots_cached": stats.slots_cached,
                "base_bytes_used": stats.base_bytes_used,
                "base_bytes_total": stats.base_bytes_total,
                "lr_bytes_used": stats.lr_bytes_used,
                "lr_bytes_total": stats.lr_bytes_total,
                "evicted": stats.base_evicted + stats.lr_evicted,
            }
            | cache,
            "replicas": [asdict(each) for each in service.replicas],
            "ledger": None if ledger is None else await self._sums(ledger),
        }

    async def _sums(self, ledger: Ledger) -> dict[str, Any]:
        """The ledger is added up anew after a while that grows with it: nobody's page shall keep the disk busy."""
        if self._ledger is None or time.monotonic() >= self._ledger[0]:
            began = time.monotonic()
            sums = await asyncio.to_thread(_ledger, ledger)
            took = time.monotonic() - began
            self._ledger = (time.monotonic() + max(_LEDGER_FRESH_S, 20 * took), sums)
        return self._ledger[1]

    def _cache(
        self, at: int, engines: int, view: CacheView, writers: dict[int, str], digests: dict[str, str]
    ) -> dict[str, Any]:
        """Of the engine `at`, with ids that no other of the `engines` gives to its nodes."""
        now, times = time.monotonic(), self._times[at]
        times[view.now] = now
        while len(times) > 600:
            times.popitem(last=False)

        def idle(last_used: int) -> float:
            """Since the first look that saw it."""
            return next((now - seen for when, seen in times.items() if when >= last_used), 0.0)

        def named(tag: int) -> str:
            return writers.get(tag, "a role that has gone")

        nodes = [
            {
                "id": node.id * engines + at,
                "parent": None if node.parent is None else node.parent * engines + at,
                "part": node.part,
                "owner": digests.get(node.owner, "a role that has gone") if node.owner else "all roles",
                "start": node.start,
                "length": node.length,
                "writers": [[named(tag), count] for tag, count in node.writers],
                "readers": sorted({named(tag) for tag in node.readers}),
                "held": node.held,
                "idle_s": round(idle(node.last_used), 1),
            }
            for node in view.nodes
        ]
        return {"truncated": not view.whole, "nodes": nodes}


def _percentiles(histogram: Histogram) -> dict[str, float | int | None]:
    shares = {"p50": histogram.percentile(0.5), "p95": histogram.percentile(0.95)}
    rounded = {name: None if value is None else round(1e3 * value, 2) for name, value in shares.items()}
    return {"count": histogram.count} | rounded


def _ledger(ledger: Ledger) -> dict[str, Any]:
    total = sums_body(ledger.store.sums())
    return {
        "unit": ledger.prices.unit,
        "rows": total["requests"],
        "cost": total["cost"],
        "groups": {
            group: [{"name": each.name} | sums_body(each) for each in ledger.store.groups(group, limit=_ROWS)]
            for group in GROUPS
        },
        "budgets": [
            {
                "scope": each.budget.scope,
                "name": each.name,
                "limit": each.budget.limit,
                "spent": each.spent,
                "reserved": each.reserved,
                "left": each.left,
            }
            for each in ledger.budgets.all()[-_ROWS:]
        ],
    }
