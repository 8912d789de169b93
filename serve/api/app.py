"""The FastAPI application: endpoints, errors, and who may reach them."""

from __future__ import annotations

import time

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from lragent.errors import LRAgentError
from lragent.serve.api.access import Access, ApiKeys
from lragent.serve.api.adapters import adapters_router
from lragent.serve.api.chat import chat_router
from lragent.serve.api.completions import completions_router
from lragent.serve.api.context import Context
from lragent.serve.api.errors import ApiError, answer_error, answer_routing_error
from lragent.serve.api.generation import ClientGoneError
from lragent.serve.api.info import info_router
from lragent.serve.api.metering import Meter
from lragent.serve.api.metrics import Latencies, Metrics
from lragent.serve.api.models import models_router
from lragent.serve.api.openapi import describe
from lragent.serve.api.page import page_router
from lragent.serve.api.service import Service
from lragent.serve.api.settings import ServeSettings
from lragent.serve.api.usage import usage_router
from lragent.serve.engine.token_text import TokenText
from lragent.serve.ledger.ledger import Ledger


def create_app(service: Service, settings: ServeSettings, ledger: Ledger | None = None) -> FastAPI:
    """Serve `service`, which the caller starts and stops, and write to `ledger`, which the caller closes."""
    keys = ApiKeys(settings.api_key, settings.admin_key)
    app = FastAPI(title="LRAgent", openapi_url="/openapi.json", docs_url=None, redoc_url=None, redirect_slashes=False)
    latencies = Latencies()
    context = Context(
        service=service,
        settings=settings,
        meter=Meter(service, latencies, ledger, settings.request_timeout_s),
        latencies=latencies,
        ledger=ledger,
        created=int(time.time()),
        token_text=TokenText(service.tokenizer),
    )
    for router in (
        models_router(context),
        chat_router(context),
        completions_router(context),
        adapters_router(context),
        usage_router(context),
        info_router(context, Metrics(service, latencies, ledger)),
        page_router(context),
    ):
        app.include_router(router)
    app.add_exception_handler(HTTPException, answer_routing_error)
    for known in (ApiError, LRAgentError, Exception):
        app.add_exception_handler(known, answer_error)
    app.add_exception_handler(ClientGoneError, _answer_nobody)
    app.add_middleware(Access, keys=keys)
    describe(app, keys=bool(keys))
    return app


async def _answer_nobody(_request: Request, _error: Exception) -> Response:
    return Response(status_code=499)
