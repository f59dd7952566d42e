"""What every section of a recipe is made of."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Precision = Literal["auto", "float32", "bfloat16"]


def exact_div(total: int, part: int, what: str) -> int:
    """total / part, or a sentence naming the two and the nearest value that works."""
    if part <= 0 or total % part:
        nearest = max(total // part, 1) * part if part > 0 else total
        raise ValueError(f"{what}: {total} is not a multiple of {part}; try {nearest}")
    return total // part


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, protected_namespaces=())


def option(default: Any, description: str, **kwargs: Any) -> Any:
    """A field with its default and its line in the reference. kwargs: pydantic's bounds (gt, ge, lt, le, pattern)."""
    return Field(default, description=description, **kwargs)
