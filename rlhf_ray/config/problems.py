"""All problems of a recipe at once.

Validation ends with the first problem of a section's rules, and looks at what sections must agree on only where each is
right by itself. So what is wrong is set back to its default, and the rest is validated again, until nothing more is found.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from typing import Any, cast

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from rlhf_ray.config.recipe import Recipe

PASSES = 50  # at most
Loc = tuple[str | int, ...]
Values = dict[str, Any]


def all_problems(values: Values, sentence: Callable[[ErrorDetails], str]) -> tuple[list[str], Recipe | None, set[str]]:
    """(a sentence for each problem; the recipe without the keys that are wrong, or None; these keys)."""
    values, problems, removed = copy.deepcopy(values), dict[str, None](), set[str]()
    for _ in range(PASSES):
        try:
            return list(problems), Recipe.model_validate({"name": "recipe"} | values), removed
        except ValidationError as error:
            found = error.errors()
        told = [(each, sentence(each)) for each in found]
        # A rule that now compares a default with something else would tell of what nobody wrote.
        problems |= {words: None for _, words in told if not mentions(words, removed)}
        before = len(removed)
        for each, words in told:
            removed |= set(_set_back(values, each, words))
        if len(removed) == before:
            break
    return list(problems), None, removed


def mentions(words: str, keys: set[str]) -> bool:
    """Whether a sentence names one of the keys, by its whole path or its last part."""
    return any(_names(words, part) for key in keys for part in (key, key.rpartition(".")[2]))


def _names(words: str, key: str) -> bool:
    """Not as a part of a longer path."""
    return re.search(rf"(?<![\w.]){re.escape(key)}(?!\w|\.\w)", words) is not None


def _set_back(values: Values, error: ErrorDetails, words: str) -> Iterator[str]:
    """Delete the keys that the error is about; their paths."""
    loc: Loc = error["loc"]
    path = [str(part) for part in loc[: next((place for place, part in enumerate(loc) if isinstance(part, int)), len(loc))]]
    if error["type"] == "missing" and len(path) == len(loc):
        path = path[:-1]
    if error["type"] != "value_error" or len(path) < len(loc):
        yield from _delete(values, path)
        return
    section = _at(values, path)
    leaves = list(_leaves(section)) if isinstance(section, dict) else []
    whole = [leaf for leaf in leaves if _names(words, ".".join([*path, *leaf]))]
    named = whole or [leaf for leaf in leaves if _names(words, leaf[-1])]
    for leaf in named:
        yield from _delete(values, [*path, *leaf])
    if not named and path:
        yield from _delete(values, path)


def _delete(values: Values, path: list[str]) -> Iterator[str]:
    parent = _at(values, path[:-1])
    if path and isinstance(parent, dict) and path[-1] in parent:
        del cast(Values, parent)[path[-1]]
        yield ".".join(path)


def _at(values: Values, path: list[str]) -> Any:
    found: Any = values
    for part in path:
        found = cast(Values, found).get(part) if isinstance(found, dict) else None
    return found


def _leaves(section: Any, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The paths of the section's keys whose values are no sections."""
    for name, value in cast(Values, section).items():
        path = (*prefix, str(name))
        if isinstance(value, dict) and value:
            yield from _leaves(value, path)
        else:
            yield path
