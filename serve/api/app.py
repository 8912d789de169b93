"""The FastAPI application: endpoints, errors, health."""

from __future__ import annotations

import time

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from lragent.errors import LRAgentError
from lragent.serve.api.chat import chat_router
from lragent.serve.api.completions import completions_router
from lragent.serve.api.context import Context, Service
from lragent.serve.api.errors import ApiError, answer_error, answer_routing_error
from lragent.serve.api.generation import ClientGoneError
from lragent.serve.api.models import models_router
from lragent.serve.api.settings import ServeSettings
from lragent.serve.engine.token_text import TokenText


def create_app(service: Service, settings: ServeSettings) -> FastAPI:
    """Serve `service`, which the caller starts and stops."""
    app = FastAPI(title="LRAgent", openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    context = Context(
        service,
        max_body_bytes=settings.max_body_bytes,
        created=int(time.time()),
        token_text=TokenText(service.tokenizer),
    )
    for router in (models_router(context), chat_router(context), completions_router(context)):
        app.include_router(router)

    @app.api_route("/health", methods=["GET", "HEAD"], response_model=None)
    async def health() -> JSONResponse:
        if not service.alive:
            raise ApiError(503, service.failure or "The engine has stopped.", code="engine_dead")
        return JSONResponse({"status": "ok"})

    app.add_exception_handler(HTTPException, answer_routing_error)
    for known in (ApiError, LRAgentError, Exception):
        app.add_exception_handler(known, answer_error)
    app.add_exception_handler(ClientGoneError, _answer_nobody)
    return app


async def _answer_nobody(_request: Request, _error: Exception) -> Response:
    return Response(status_code=499)
