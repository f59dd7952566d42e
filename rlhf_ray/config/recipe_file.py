"""Recipes as files: read, overridden by --set, validated in words."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator, Set
from importlib import resources
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from rlhf_ray.config import Recipe, RewardConfig
from rlhf_ray.config.problems import all_problems
from rlhf_ray.config.stage_table import BUILT_IN, STAGES
from rlhf_ray.errors import UserError


class RecipeError(UserError):
    """Problems of a recipe, one per line. rest: the recipe without the keys that are wrong, for what else there is to say of it."""

    rest: Recipe | None = None
    wrong: Set[str] = frozenset()


def packaged_recipes() -> dict[str, Path]:
    """Name -> path of the recipes that come with the package."""
    folder = Path(str(resources.files("rlhf_ray") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_recipe(path_or_name: str, overrides: list[str] | None = None) -> Recipe:
    """The recipe of a YAML file or a packaged name, with key=value overrides. Raises UserError, one line per problem."""
    return build_recipe(read_yaml(path_or_name), overrides or [], str(path_or_name))


def read_yaml(path_or_name: str) -> dict[str, Any]:
    path = Path(path_or_name)
    packaged = packaged_recipes()
    if path_or_name in packaged and not path.is_file():
        path = packaged[path_or_name]
    elif path.is_dir():
        raise UserError(f"'{path_or_name}' is a folder; name the recipe's YAML file (a run folder's is recipe.yaml)")
    elif not path.exists():
        near = difflib.get_close_matches(path_or_name, packaged, 1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise UserError(
            f"there is no recipe file '{path_or_name}', and no packaged recipe of that name "
            f"({', '.join(packaged)}){hint}"
        )
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _RecipeLoader)
    except OSError as error:
        raise UserError(f"{path} could not be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        problem = error.problem if isinstance(error, yaml.MarkedYAMLError) else None
        mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
        raise UserError(
            f"{path} is not YAML{f' (line {mark.line + 1})' if mark else ''}: {problem or error}"
        ) from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no mapping of keys to values; a recipe starts with 'name: ...'")
    return cast(dict[str, Any], values)


class _RecipeLoader(yaml.SafeLoader):
    """Refuses what the library lets pass (of two equal keys it takes the last) or leaves as an error of Python's."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """A value that is not of its type (the 45th of a month, a number of 5,000 digits) is an error with its line."""
        try:
            return cast(Any, super()).construct_object(node, deep)
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            kind = str(node.tag).rpartition(":")[2]
            why = f" ({str(error).partition(';')[0]})" if isinstance(error, ValueError) else ""
            shown = f"'{node.value[:40]}' is" if isinstance(node, yaml.ScalarNode) else "there is"
            problem = f"{shown} no {kind}{why}; correct it, or write it in quotes where it is text"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        given: Any = node  # a sequence that is marked as a mapping comes here too, and the library refuses it
        for key, _ in given.value if isinstance(given, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    problem = f"the key '{key.value}' stands there twice; keep one of the two"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def build_recipe(values: dict[str, Any], overrides: list[str], source: str) -> Recipe:
    """Validate. UserError with every problem, one line each."""
    for override in overrides:
        _override(values, override)
    if "name" not in values:
        values = {"name": Path(source).stem, **values}
    try:
        return Recipe.model_validate(values)
    except ValidationError:
        problems, rest, wrong = all_problems(values, _sentence)
    error = RecipeError("\n".join(problems))
    error.rest, error.wrong = rest, wrong
    raise error from None


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"--set {override!r}: write key=value, for example --set ppo.steps=10")
    try:
        value = yaml.load(text, _RecipeLoader)
    except (yaml.YAMLError, RecursionError):
        value = text
    if isinstance(value, str) and value == text.strip():  # a value in quotes is text
        value = _number(value)
    *parents, last = key.strip().split(".")
    for part in parents:
        if not isinstance(values.get(part), dict):
            values[part] = {}
        values = values[part]
    values[last] = value


def _number(text: str) -> str | float:
    """YAML 1.1 reads 1e-5 as text; people mean the number."""
    try:
        return float(text)
    except ValueError:
        return text


def _sentence(error: ErrorDetails) -> str:
    """One pydantic error in words, with the key, the value and the remedy."""
    key = ".".join(str(part) for part in error["loc"])
    value = error.get("input")
    if error["type"] == "extra_forbidden":
        names = known_keys(error["loc"][:-1])
        near = difflib.get_close_matches(str(error["loc"][-1]), names, 1, 0.5)
        return f"unknown key '{key}'; " + (
            f"did you mean '{near[0]}'?" if near else f"the keys there are {', '.join(names)}"
        )
    if error["type"] == "missing":
        return f"'{key}' is missing; set it"
    if error["type"] == "value_error":
        message = error["msg"].removeprefix("Value error, ")
        return f"{key}: {message}" if key and not message.startswith(key) else message
    return f"'{key}' is {_shown(value)}: {error['msg'][0].lower()}{error['msg'][1:]}"


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python does not write a whole number of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 200 else f"{text[:200]} ..."


def known_keys(path: tuple[str | int, ...]) -> list[str]:
    """The keys that the section at `path` has."""
    if not path:
        return [*Recipe.model_fields, *(name for name in STAGES if name not in Recipe.model_fields)]
    registered = STAGES[path[0]].section if path[0] in STAGES else None
    section: Any = registered or Recipe
    named = False  # whether the next part is a name that the user gave
    for part in path[1:] if registered else path:
        if named or isinstance(part, int):
            named = False
            continue
        annotation = section.model_fields[part].annotation
        section, named = _section_type(annotation), typing.get_origin(annotation) is dict
    return list(section.model_fields)


def _section_type(annotation: Any) -> Any:
    """The Section class in `Section`, `Section | None`, `tuple[Section, ...]` or `dict[str, Section]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is not None:
        for part in typing.get_args(annotation):
            found = _section_type(part)
            if found is not None:
                return found
    return None


def path_fields(recipe: Recipe) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """(key path, text) of every field that may hold a local path: data, and models that are not the run's own."""
    if not recipe.model.is_from_scratch:
        yield ("model", "name_or_path"), recipe.model.name_or_path
    for stage, section in recipe.trained.items():
        if isinstance(section, RewardConfig) and not section.starts_within_run:
            yield (stage, "base"), section.base
    if recipe.ppo.reference is not None:
        yield ("ppo", "reference"), recipe.ppo.reference
    for name, term in recipe.ppo.rewards.items():
        if term.model not in (None, "reward"):
            yield ("ppo", "rewards", name, "model"), term.model
    if recipe.data.root is not None:
        yield ("data", "root"), recipe.data.root
    if recipe.data.votes is not None and not recipe.data.votes.is_url:
        yield ("data", "votes", "url"), recipe.data.votes.url
    for role, sources in recipe.data.lists.items():
        for index, source in enumerate(sources):
            if recipe.data.root is None or Path(source.path).is_absolute():  # else it is relative to the root
                yield ("data", role, index, "path"), source.path


def function_names(recipe: Recipe) -> list[str]:
    """The user's functions that score, tell traits or run a stage: package.module:function, each."""
    names = [*(term.function for term in recipe.ppo.terms.values())]
    names += [path for _, path in recipe.evaluation.functions]
    return [name for name in names if name is not None] + stage_functions(recipe)


def stage_functions(recipe: Recipe) -> list[str]:
    """The functions of the recipe's stages that plugins add."""
    stages = [STAGES[name] for name in recipe.stages if name not in BUILT_IN]
    return [stage.run if stage.train is None else stage.train for stage in stages]


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """{'ppo': {'steps': 3}} -> {'ppo.steps': 3}; lists are values."""
    if isinstance(values, dict) and values:
        parts = cast(dict[str, Any], values)
        return {key: leaf for name, part in parts.items() for key, leaf in flatten(part, f"{prefix}{name}.").items()}
    return {prefix[:-1]: values}
