"""All problems of a recipe at once.

Validation ends with the first problem of a section's rules, and looks at what sections must agree on only where each is
right by itself. So what is wrong is set back to its default, and the rest is validated again, until nothing more is found.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from rlhf_ray.config.recipe import Recipe

PASSES = 50  # at most
PATH = re.compile(r"(?<![\w.-])[\w-]+(?:\.[\w-]+)+")  # a key with its sections: ppo.adaptive_kl.target
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
        problems |= {words: None for each, words in told if not mentions(words, removed, _section(each))}
        before = len(removed)
        for each, words in told:
            removed |= set(_set_back(values, each, words))
        if len(removed) == before:
            break
    return list(problems), None, removed


def mentions(words: str, keys: Iterable[str], section: str = "") -> bool:
    """Whether a sentence names one of the keys or what is in it. section: of the rule that says it.

    A path is compared as a whole. The last part alone counts where the sentence is about its section: that is `section`, or
    another key of it stands there by its whole path. A key without a path may be a plain word: it counts as the subject only.
    """
    paths = PATH.findall(words)
    sections = {path.rpartition(".")[0] for path in paths}

    def named(key: str) -> bool:
        parent, _, last = key.rpartition(".")
        if any(path == key or path.startswith(f"{key}.") for path in paths):
            return True
        if not parent:
            return re.search(rf"(?<![\w.]){re.escape(key)}(?= is | = |:)", words) is not None
        within = parent in sections or (section != "" and f"{parent}.".startswith(f"{section}."))
        return within and re.search(rf"(?<![\w.]){re.escape(last)}(?!\w|\.\w)", words) is not None

    return any(named(key) for key in keys)


def _section(error: ErrorDetails) -> str:
    """Where the rule or the key of the error stands, without the numbers of a list's entries."""
    return ".".join(_path(error))


def _path(error: ErrorDetails) -> list[str]:
    loc: Loc = error["loc"]
    return [
        str(part) for part in loc[: next((place for place, part in enumerate(loc) if isinstance(part, int)), len(loc))]
    ]


def _set_back(values: Values, error: ErrorDetails, words: str) -> Iterator[str]:
    """Delete the keys that the error is about; their paths."""
    path, whole_loc = _path(error), len(error["loc"])
    if error["type"] == "missing" and len(path) == whole_loc:
        path = path[:-1]
    if error["type"] != "value_error" or len(path) < whole_loc:
        yield from _delete(values, path)
        return
    section = _at(values, path)
    leaves = list(_leaves(section)) if isinstance(section, dict) else []
    keys = {leaf: ".".join([*path, *leaf]) for leaf in leaves}
    paths = set(PATH.findall(words))
    named = [leaf for leaf in leaves if keys[leaf] in paths]
    named = named or [leaf for leaf in leaves if mentions(words, [keys[leaf]], ".".join(path))]
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
