"""The models endpoints: the base and its roles as OpenAI model cards, and which role a model name means."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.responses import JSONResponse

from lragent.chat import BASE
from lragent.serve.api.context import Context
from lragent.serve.api.openapi import answers
from lragent.serve.api.service import Service
from lragent.serve.engine.types import RoleCard, UnknownRoleError


def resolve_role(service: Service, model: str) -> str:
    """Return the role that `model` names: a role, `base` or the base model's name, or `base:role`.

    Raises UnknownRoleError for any other name: nothing falls back to the base.
    """
    roles = [card.name for card in _adapters(service)]
    if model in roles:
        return model
    if model in (BASE, service.model_name):
        return BASE
    for base in (service.model_name, BASE):
        role = model.removeprefix(f"{base}:")
        if role != model and role in roles:
            return role
    raise UnknownRoleError(f"model: {model!r} is not served here; choose one of {', '.join([BASE, *roles])}.")


def models_router(context: Context) -> APIRouter:
    """GET /v1/models and /v1/models/{id}."""
    router = APIRouter()

    some = answers(json={"type": "object"})

    @router.get("/v1/models", response_model=None, openapi_extra=some)
    async def list_models() -> JSONResponse:
        service = context.service
        cards = [_base_card(context), *(_role_card(context, role) for role in _adapters(service))]
        return JSONResponse({"object": "list", "data": cards})

    @router.get("/v1/models/{model:path}", response_model=None, openapi_extra=some)
    async def get_model(model: str) -> JSONResponse:
        name = resolve_role(context.service, model)
        if name == BASE:
            return JSONResponse(_base_card(context))
        role = next(card for card in _adapters(context.service) if card.name == name)
        return JSONResponse(_role_card(context, role))

    return router


def _adapters(service: Service) -> list[RoleCard]:
    return [card for card in service.roles if card.parent is not None]


def _base_card(context: Context) -> dict[str, Any]:
    base = next(card for card in context.service.roles if card.parent is None)
    return _card(context, context.service.model_name, root=base.root, parent=None)


def _role_card(context: Context, role: RoleCard) -> dict[str, Any]:
    return _card(context, role.name, root=role.root, parent=context.service.model_name)


def _card(context: Context, name: str, *, root: str, parent: str | None) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": context.created,
        "owned_by": "lragent",
        "root": root,
        "parent": parent,
        "max_model_len": context.service.max_model_len,
    }
