"""The OpenAPI document of the app: its bodies are read by `protocol.parse`, which FastAPI does not see."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from rlhf_ray.serving.request_bodies import ChatRequest, CompletionRequest

BODIES: dict[str, type[BaseModel]] = {"/v1/completions": CompletionRequest, "/v1/chat/completions": ChatRequest}
_ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def describe_bodies(app: FastAPI, bodies: Mapping[str, type[BaseModel]], streams: Collection[str] = ()) -> None:
    """Make the app's document say what the bodies of its POST requests (path -> type) and of errors are.

    streams: the paths whose answers may be, or are, server-sent events
    """

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app, bodies)
            for path in streams:
                answer = app.openapi_schema["paths"][path]["post"]["responses"]["200"]
                answer.setdefault("content", {})["text/event-stream"] = {"schema": {"type": "string"}}
        return app.openapi_schema

    app.openapi = document


def _document(app: FastAPI, bodies: Mapping[str, type[BaseModel]]) -> dict[str, Any]:
    document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    _, schemas = models_json_schema(
        [(body, "validation") for body in bodies.values()], ref_template="#/components/schemas/{model}"
    )
    components = document.setdefault("components", {})
    answers = {name: schema for name, schema in components.get("schemas", {}).items() if "ValidationError" not in name}
    components["schemas"] = answers | schemas["$defs"] | {"Error": _ERROR}
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    document["security"] = [{"key": []}, {}]
    for path, body in bodies.items():
        reference = {"$ref": f"#/components/schemas/{body.__name__}"}
        operation = document["paths"][path]["post"]
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": reference}}}
    error = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}}
    for operations in document["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)  # FastAPI's own, which this app never sends
            operation["responses"] |= {"4XX": {"description": "refused", **error}, "5XX": {"description": "failed", **error}}
    return document
