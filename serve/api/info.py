"""Small endpoints of an operator's: /health, /version, /metrics, and vLLM's /tokenize and /detokenize."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

import lragent
from lragent.errors import UserError
from lragent.serve.api.access import must_be_admin
from lragent.serve.api.body import read_json
from lragent.serve.api.context import Context
from lragent.serve.api.errors import ApiError
from lragent.serve.api.metrics import Metrics
from lragent.serve.api.models import resolve_role
from lragent.serve.api.openapi import answers, body_of
from lragent.serve.api.schema import Flag, Label, Text, Whole, listed_messages, parse_body
from lragent.serve.engine.types import NoReplicaError


class TokenizeRequest(BaseModel):
    """Either prompt or messages."""

    model: Label | None = None
    prompt: Text | None = None
    messages: list[Any] | None = None
    add_special_tokens: Flag | None = None


class DetokenizeRequest(BaseModel):
    """tokens: ids."""

    model: Label | None = None
    tokens: list[Whole]


def info_router(context: Context, metrics: Metrics) -> APIRouter:
    """The endpoints, over `context`."""
    router = APIRouter()
    service = context.service
    some = answers(json={"type": "object"})

    @router.get("/health", response_model=None, openapi_extra=some)
    @router.head("/health", response_model=None, include_in_schema=False)
    async def health() -> JSONResponse:
        failure = service.failure  # a replica may come at any moment
        if service.replicas and failure is not None:
            raise NoReplicaError
        if not service.alive:
            raise ApiError(503, failure or "The engine has stopped.", code="engine_dead")
        body: dict[str, Any] = {"status": "ok"}
        if service.replicas:
            body["replicas"] = {"alive": sum(each.alive for each in service.replicas), "of": len(service.replicas)}
        return JSONResponse(body)

    @router.get("/version", response_model=None, openapi_extra=some)
    async def version() -> JSONResponse:
        return JSONResponse({"version": lragent.__version__})

    @router.get("/metrics", response_model=None, openapi_extra=answers(plain={"type": "string"}))
    async def get_metrics(request: Request) -> Response:
        must_be_admin(request)
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @router.post("/tokenize", response_model=None, openapi_extra=body_of(TokenizeRequest) | some)
    async def tokenize(request: Request) -> JSONResponse:
        asked = parse_body(TokenizeRequest, await read_json(request, context.settings.max_body_bytes))
        role = "base" if asked.model is None else resolve_role(service, asked.model)
        if (asked.prompt is None) == (asked.messages is None):
            raise UserError("prompt: give either prompt or messages.")

        def work() -> list[int]:
            if asked.messages is not None:
                return service.chat.prepare(listed_messages(asked.messages), role, "").ids.tolist()
            special = asked.add_special_tokens is not False
            ids: list[int] = service.tokenizer(asked.prompt, add_special_tokens=special)["input_ids"]
            return ids

        ids = await context.tokenize(work)
        return JSONResponse({"count": len(ids), "max_model_len": service.max_model_len, "tokens": ids})

    @router.post("/detokenize", response_model=None, openapi_extra=body_of(DetokenizeRequest) | some)
    async def detokenize(request: Request) -> JSONResponse:
        asked = parse_body(DetokenizeRequest, await read_json(request, context.settings.max_body_bytes))
        if asked.model is not None:
            resolve_role(service, asked.model)
        size = len(service.tokenizer)
        if any(not 0 <= token < size for token in asked.tokens):
            raise UserError(f"tokens: must be between 0 and {size - 1}.")
        text = await context.tokenize(lambda: service.tokenizer.decode(asked.tokens))
        return JSONResponse({"prompt": text})

    return router
