"""A recipe's keys that are not fields of it: the sections of stages that plugins add."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError
from pydantic_core import InitErrorDetails

from rlhf_ray.config.base import Section
from rlhf_ray.config.stage_table import STAGES


def plugin_section(name: str, value: Any, *, has_plugins: bool) -> Section | None:
    """The validated section of a plugin's stage. ValidationError for a name that is not a stage, or for an invalid value."""
    stage = STAGES.get(name)
    if stage is None or stage.section is None or not has_plugins:
        unknown = InitErrorDetails(type="extra_forbidden", loc=(), input=value)
        raise ValidationError.from_exception_data(name, [unknown])
    return None if value is None else stage.section.model_validate(value)


def details(error: ValidationError, prefix: tuple[str, ...] = ()) -> list[InitErrorDetails]:
    """The error's problems, to be raised again together with others."""
    return [
        InitErrorDetails(type=each["type"], loc=(*prefix, *each["loc"]), input=each["input"], ctx=each.get("ctx", {}))
        for each in error.errors()
    ]
