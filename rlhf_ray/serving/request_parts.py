"""Parts of requests: a chat's messages, as clients write them and as they send answers back, and what form an answer is to have."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rlhf_ray.serving.api_errors import bad_request

# What an answer carries beside its text. Sent back, it says nothing that a chat template writes.
_ABOUT_AN_ANSWER = ("annotations", "reasoning", "reasoning_content", "thinking", "id", "phase", "token_ids", "stop_reason")
_LABELS = ("cache_control",)  # what a client may write into any message or part for another server


Item = TypeVar("Item")
Several = Annotated[list[Item], Field(fail_fast=True)]
"""A list of a client's, of which the first wrong item is told: to note all 300,000 that a body may hold takes seconds and 1 GB."""


class StrictBody(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class JsonSchema(StrictBody):
    """OpenAI's wrapping of a JSON schema. It is followed whether `strict` is set or not."""

    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    schema_: dict[str, Any] = Field(alias="schema")


class ResponseFormat(StrictBody):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_where_it_is_used(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise bad_request(
                "response_format has a json_schema if its type is 'json_schema', and none otherwise.", param="response_format"
            )
        return self

    @property
    def schema_text(self) -> str | None:
        """The JSON schema that an answer is held to; None: it is text."""
        if self.json_schema is not None:
            return json.dumps(self.json_schema.schema_)
        return '{"type": "object"}' if self.type == "json_object" else None


class TextPart(StrictBody):
    type: Literal["text"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _by_any_name(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("type") == "refusal":
            data = {"type": "text", "text": data.get("refusal")}
        elif isinstance(data, dict) and data.get("type") in ("input_text", "output_text"):
            data = data | {"type": "text"}
        return _without_empty(cls, data)


class Message(StrictBody):
    """A turn. An answer may come back as any client holds it: fields that say nothing are dropped, whatever their name."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Several[TextPart]
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _as_clients_send_it(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("role") == "assistant":
            data = _answer(data)
        return _without_empty(cls, data)

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


def _answer(message: dict[str, Any]) -> dict[str, Any]:
    for name in ("tool_calls", "function_call", "audio"):
        if message.get(name):
            raise bad_request(
                f"messages hold an answer with {name}, which this server does not support.",
                param=f"messages.{name}", code="unsupported_parameter",
            )  # fmt: skip
    kept = {name: value for name, value in message.items() if name not in _ABOUT_AN_ANSWER}
    refusal = kept.pop("refusal", None)
    if kept.get("content") is None and ("content" in kept or refusal):
        kept["content"] = refusal or ""
    return kept


def _without_empty(kind: type[BaseModel], data: Any) -> Any:
    """The fields that the type knows, and those that hold something."""
    if not isinstance(data, dict):
        return data
    return {
        name: value
        for name, value in data.items()
        if name in kind.model_fields or (name not in _LABELS and value not in (None, [], {}, "", False))
    }
