"""The OpenAPI document: what each endpoint takes and answers, for clients that are made from it."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

import lragent

ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_WRONG = {
    "400": "The request is wrong; the message says what and how to mend it.",
    "401": "An API key is needed.",
    "403": "The admin key is needed.",
    "404": "There is no such model, role or path.",
    "405": "The path takes other methods.",
    "413": "The body is too large.",
    "429": "Too much is asked for at once, or a budget is used up.",
    "503": "The engine or the ledger has failed, or the server is shutting down.",
}
_MEDIA_TYPES = {"json": "application/json", "plain": "text/plain", "events": "text/event-stream"}
_ERROR_BODY = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}


def body_of(model: type[BaseModel]) -> dict[str, Any]:
    """What FastAPI is told of an endpoint that reads its body itself: that it is a `model`."""
    schema = model.model_json_schema(ref_template=f"#/components/schemas/{model.__name__}/$defs/{{model}}")
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": _inlined(schema)}}}}


def answers(**bodies: Any) -> dict[str, Any]:
    """Schemas by the kind of body (`json`, `plain`, `events`), as the answer 200 of an endpoint."""
    content = {_MEDIA_TYPES[kind]: {"schema": schema} for kind, schema in bodies.items()}
    return {"responses": {"200": {"description": "Done.", "content": content}}}


def text_answers(model: type[BaseModel]) -> dict[str, Any]:
    """An endpoint that takes a `model` and answers whole or as a stream."""
    return body_of(model) | answers(json={"type": "object"}, events={"type": "string"})


def describe(app: FastAPI, *, keys: bool) -> None:
    """Let `app` describe itself at /openapi.json. keys: whether it asks for API keys."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(
                title="LRAgent",
                version=lragent.__version__,
                description="One model and its roles over OpenAI's API: `model` names the role.",
                routes=app.routes,
            )
            components = schema.setdefault("components", {})
            components.setdefault("schemas", {})["Error"] = ERROR
            if keys:
                components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
                schema["security"] = [{"key": []}]
            for operations in schema["paths"].values():
                for operation in operations.values():
                    responses = operation["responses"]
                    responses.pop("422", None)
                    for status, text in _WRONG.items():
                        responses.setdefault(status, {"description": text, "content": _ERROR_BODY})
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]  # FastAPI's own way to replace it


def _inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with its few definitions where they are used: it stands in a document of its own root."""
    definitions = schema.pop("$defs", {})

    def walk(value: Any) -> Any:
        if isinstance(value, dict):
            reference = value.get("$ref")
            if isinstance(reference, str):
                return walk(definitions[reference.rpartition("/")[2]])
            return {key: walk(each) for key, each in value.items()}
        return [walk(each) for each in value] if isinstance(value, list) else value

    walked: dict[str, Any] = walk(schema)
    return walked
