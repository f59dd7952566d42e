"""The recipe reference: markdown tables made from the types, so that it can't differ from them.

    python -m rlhf_ray.config.reference                     print it
    python -m rlhf_ray.config.reference --write FILE        put it between the two markers of FILE (README.md beside this module)
    python -m rlhf_ray.config.reference --plugins MODULE    with the sections of the stages that MODULE adds

A section class that several keys use is one table; what a class inherits is in the table of its parent.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import types
import typing
from pathlib import Path

import annotated_types
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from rlhf_ray.config import Recipe, Section
from rlhf_ray.config.base import OneOf
from rlhf_ray.config.stage_table import STAGES
from rlhf_ray.config.user_functions import import_plugins
from rlhf_ray.errors import UserError

BEGIN, END = "<!-- recipe-reference -->", "<!-- /recipe-reference -->"
WORDS = {int: "integer", float: "number", bool: "true or false", str: "text", dict: "mapping", datetime.date: "date",
         type(None): "null"}  # fmt: skip
BOUNDS = {annotated_types.Gt: (">", "gt"), annotated_types.Ge: (">=", "ge"),
          annotated_types.Lt: ("<", "lt"), annotated_types.Le: ("<=", "le")}  # fmt: skip

PLACES: dict[typing.Any, str] = {tuple: "[]", dict: ".<name>"}  # what follows a key that holds several sections


def reference() -> str:
    """The whole reference."""
    places = section_places(Recipe)
    for stage in STAGES.values():  # those of plugins
        if stage.section is not None:
            places.setdefault(stage.section, []).append(stage.name)
    parts = [_table("Top level", "", _leaves(Recipe))]
    shown: set[type[Section]] = set()
    for section in places:
        for kind in (*_parents(section), section):
            if kind not in shown:
                shown.add(kind)
                parts.append(_section(kind, places))
    return "\n".join(parts)


def section_places(kind: type[Section], prefix: str = "") -> dict[type[Section], list[str]]:
    """Section class -> the keys that hold it, in the recipe's order."""
    places: dict[type[Section], list[str]] = {}
    for name, field in kind.model_fields.items():
        section = section_of(field.annotation)
        if section is None:
            continue
        key = f"{prefix}{name}" + PLACES.get(typing.get_origin(field.annotation), "")
        places.setdefault(section, []).append(key)
        for inner, keys in section_places(section, f"{key}.").items():
            places.setdefault(inner, []).extend(keys)
    return places


def section_of(annotation: object) -> type[Section] | None:
    """The section class in `Section`, `Section | None`, `tuple[Section, ...]` or `dict[str, Section]`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    found = (section_of(part) for part in typing.get_args(annotation))
    return next((section for section in found if section is not None), None)


def _parents(kind: type[Section]) -> list[type[Section]]:
    """Section classes that `kind` inherits keys from, the most general first."""
    return [
        parent for parent in reversed(kind.__mro__[1:])
        if issubclass(parent, Section) and parent is not Section
    ]  # fmt: skip


def _section(kind: type[Section], places: dict[type[Section], list[str]]) -> str:
    """One table. The table of a class that others inherit from stands for their keys too."""
    keys = [key for other, others in places.items() if issubclass(other, kind) for key in others]
    words = " ".join((kind.__doc__ or "").split())
    if _parents(kind):
        words += " Beside the table above, or in its place:"
    return _table(", ".join(f"`{key}`" for key in keys), words, _own_fields(kind))


def _own_fields(kind: type[Section]) -> dict[str, FieldInfo]:
    """The class's leaf fields that its parents don't have in the same form."""
    before = {name: field for parent in _parents(kind) for name, field in parent.model_fields.items()}
    return {
        name: field for name, field in _leaves(kind).items()
        if name not in before or _row(name, before[name]) != _row(name, field)
    }  # fmt: skip


def _leaves(kind: type[Section]) -> dict[str, FieldInfo]:
    """Fields that are values, or sections that can be null: what is always a section has only a table of its own."""
    return {
        name: field for name, field in kind.model_fields.items()
        if section_of(field.annotation) is None or type(None) in typing.get_args(field.annotation)
        or typing.get_origin(field.annotation) in PLACES
    }  # fmt: skip


def _table(title: str, words: str, fields: dict[str, FieldInfo]) -> str:
    lines = [f"#### {title}", ""]
    if words:
        lines += [words, ""]
    if fields:
        lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
        lines += [_row(name, field) for name, field in fields.items()]
    return "\n".join([*lines, ""])


def _row(name: str, field: FieldInfo) -> str:
    default = "required" if field.default is PydanticUndefined else f"`{_value(field.default)}`"
    meaning = (field.description or "").replace("|", "\\|").replace("<", "&lt;")
    return f"| `{name}` | {_type(field)} | {default} | {meaning} |"


def _type(field: FieldInfo) -> str:
    # getattr: the bound's name depends on its kind.
    bounds = [f"{sign} {_value(getattr(part, name))}" for part in field.metadata
              for kind, (sign, name) in BOUNDS.items() if isinstance(part, kind)]  # fmt: skip
    names = next((part.names for part in field.metadata if isinstance(part, OneOf)), None)
    if names is not None:
        return " or ".join(f"`{name}`" for name in names)
    words, null, _ = _type_words(field.annotation).partition(" or null")
    return " ".join([words, ", ".join(bounds)]).strip() + (f"{',' if bounds else ''}{null}" if null else "")


def _type_words(annotation: object) -> str:
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " or ".join(f"`{_value(part)}`" for part in parts)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type_words(part) for part in parts)
    if origin is tuple:
        return f"list of {_plural(_type_words(parts[0]))}"
    if origin is dict:
        return "mapping"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "section"
    return WORDS[annotation]  # type: ignore[index]


def _plural(word: str) -> str:
    return word if word == "text" else f"{word}s"


def _value(value: object) -> str:
    """As one writes it in YAML; a section whose keys are all at their defaults is {}."""
    if isinstance(value, Section):
        return "{}"
    if isinstance(value, float):
        return f"{value:g}".replace("e-0", "e-")
    if isinstance(value, str):
        return value
    return json.dumps(value)


def write_between_markers(text: str, body: str, where: str) -> str:
    """`text` with `body` between the markers. Raises UserError where it has not both of them."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise UserError(f"{where} holds no {BEGIN} ... {END}; put the two markers where the reference belongs")
    return f"{head}{begin}\n\n{body}\n{end}{tail}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m rlhf_ray.config.reference", description="The recipe reference.")
    parser.add_argument("--write", type=Path, metavar="FILE", help="update FILE between its markers")
    parser.add_argument("--plugins", nargs="+", metavar="MODULE", default=(), help="import these first")
    given = parser.parse_args(arguments)
    try:
        import_plugins(given.plugins)
        if given.write is None:
            print(reference())
            return 0
        given.write.write_text(write_between_markers(given.write.read_text(), reference(), str(given.write)))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
