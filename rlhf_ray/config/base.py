"""What every section of a recipe is made of."""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, ValidationInfo, field_validator
from pydantic_core import CoreSchema, core_schema

from rlhf_ray.tables.table import Table

Precision = Literal["auto", "float32", "bfloat16"]
SEEDS = 2**31  # NumPy takes seeds below 2 ** 32, and stages add to the recipe's
LONGEST_S = 2e6  # 23 days; epoll takes 2 ** 31 milliseconds
MOST_THREADS = 1024  # of a process: OpenMP ends it where the system gives it fewer than it asks for
MOST_ACTORS = 10_000  # of a role, or workers of a stage
LEAST_RESERVED = 1e-4  # of a CPU or a GPU; Ray knows no smaller share
SMALLEST, LARGEST = 1.2e-38, 3.4e38  # of 32-bit floats, in which models, scores and losses are computed


def exact_div(total: int, part: int, what: str) -> int:
    """total / part, or a sentence naming the two and the nearest value that works."""
    if part <= 0 or total % part:
        nearest = max(total // part, 1) * part if part > 0 else total
        raise ValueError(f"{what}: {total} is not a multiple of {part}; try {nearest}")
    return total // part


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, protected_namespaces=(), allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Python takes true for 1, and so would pydantic."""
        given = list(cast(list[Any], value)) if isinstance(value, (list, tuple)) else [value]
        kinds = set(_kinds(cls.model_fields[str(info.field_name)].annotation))
        if any(isinstance(each, bool) for each in given) and kinds & {int, float} and bool not in kinds:
            raise ValueError("true and false are no numbers; give a number")
        return cast(Any, value)

    @field_validator("*")
    @classmethod
    def _numbers_are_finite(cls, value: Any) -> Any:
        """Of every field, what mappings and lists hold included: what overflows in 32 bits becomes NaN in the weights."""
        for number in _numbers(value):
            if number != 0 and not SMALLEST <= abs(number) <= LARGEST:  # NaN is neither
                raise ValueError(
                    f"{number:.3g} is 0 or not finite as a 32-bit float, in which models compute; "
                    f"give 0, or a number between {SMALLEST:g} and {LARGEST:g} in size"
                )
        return value

    @field_validator("*")
    @classmethod
    def _texts_hold_no_nul(cls, value: Any) -> Any:
        """No path, name or argument of another program can: what is handed a NUL ends in an error of Python's."""
        if any("\0" in text for text in _texts(value)):
            raise ValueError("a NUL character stands in it; remove it")
        return value


def _kinds(annotation: Any) -> Iterator[type]:
    """The types that an annotation is made of; of a Literal's values, theirs."""
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is Literal:
        yield from (type(value) for value in arguments)
    elif arguments:
        for part in arguments:
            yield from _kinds(part)
    elif isinstance(annotation, type):
        yield annotation


def check_reserved(value: float) -> float:
    """A share of a CPU or a GPU. ValueError for one that Ray can't reserve."""
    if 0 < value < LEAST_RESERVED:
        raise ValueError(f"{value:g} is less than Ray can reserve; give {LEAST_RESERVED:g} or more")
    return value


def _numbers(value: Any) -> Iterator[float]:
    """The numbers in a field's value. Sections have looked at theirs."""
    if isinstance(value, float):
        yield value
    elif isinstance(value, int):
        yield float(min(max(value, -(10**39)), 10**39))
    elif isinstance(value, dict):
        for part in cast(dict[Any, Any], value).values():
            yield from _numbers(part)
    elif isinstance(value, (list, tuple)):
        for part in cast(list[Any], value):
            yield from _numbers(part)


def _texts(value: Any) -> Iterator[str]:
    """The texts in a field's value, the keys of mappings too. Sections have looked at theirs."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, part in cast(dict[Any, Any], value).items():
            yield from _texts(key)
            yield from _texts(part)
    elif isinstance(value, (list, tuple)):
        for part in cast(list[Any], value):
            yield from _texts(part)


def option(default: Any, description: str, **kwargs: Any) -> Any:
    """A field with its default and its line in the reference. kwargs: pydantic's bounds (gt, ge, lt, le, pattern)."""
    return Field(default, description=description, **kwargs)


@dataclass(frozen=True)
class OneOf:
    """Annotated[str, OneOf(TABLE)]: a name of the table, also one that was added after this class was made.

    only: which entries may be named here; None: all
    """

    table: Table[Any]
    only: Callable[[Any], bool] | None = None

    @property
    def names(self) -> list[str]:
        return [name for name, entry in self.table.items() if self.only is None or self.only(entry)]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def _check(self, name: str) -> str:
        problem = self.table.problem(name)
        if problem is None and name not in self.names:
            problem = f"'{name}' is {self.table.what} that can't be used here; there are {', '.join(self.names)}"
        if problem is not None:
            raise ValueError(problem)
        return name
