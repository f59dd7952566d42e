"""Columns of the prompts' rows, beside the prompt, that the recipe's functions ask for by the names of their parameters.

    def score(prompts, responses): ...                      asks for none
    def score(prompts, responses, *, answer): ...           for `answer`: a list with the value of each response's row
    def score(prompts, responses, *, level=None): ...       for `level` where the data has it
    def score(prompts, responses, **columns): ...           for all there are

`whole_prompt` is always there: each prompt as it was before it was cut to data.max_prompt_tokens. A column of the data with that
name takes its place.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from rlhf_ray.config.recipe import Recipe
from rlhf_ray.config.reward_term import RewardTerm
from rlhf_ray.config.user_functions import import_function
from rlhf_ray.errors import UserError
from rlhf_ray.tables.rewards import kind_of

Columns = Mapping[str, Sequence[Any]]  # name -> a value for each response
NO_COLUMNS: Columns = {}
WHOLE = "whole_prompt"


@dataclass(frozen=True, slots=True)
class Asked:
    """What one function asks for."""

    needed: tuple[str, ...] = ()
    welcome: tuple[str, ...] = ()
    everything: bool = False

    def among(self, there: Iterable[str]) -> tuple[str, ...]:
        """Those of `there` that it takes."""
        return tuple(name for name in there if self.everything or name in self.needed or name in self.welcome)

    def of(self, columns: Columns, prompts: Sequence[str]) -> dict[str, Sequence[Any]]:
        """prompts: their text, which is whole where no column says otherwise."""
        asks_whole = WHOLE in (*self.needed, *self.welcome) and WHOLE not in columns
        return {name: columns[name] for name in self.among(columns)} | ({WHOLE: prompts} if asks_whole else {})


def asked_by(function: Callable[..., Any]) -> Asked:
    """By a function whose first two parameters are the prompts and the responses."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # some functions in C don't say
        return Asked()
    named = [each for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]
    first = sum(each.kind is each.POSITIONAL_ONLY for each in parameters)
    others = named[max(2 - first, 0) :]
    return Asked(
        needed=tuple(each.name for each in others if each.default is each.empty),
        welcome=tuple(each.name for each in others if each.default is not each.empty),
        everything=any(each.kind is each.VAR_KEYWORD for each in parameters),
    )


def asked_by_term(term: RewardTerm) -> Asked:
    assert term.function is not None
    return asked_by(import_function(term.function))


def asked_columns(recipe: Recipe) -> dict[str, Asked]:
    """Key of the recipe -> what its function asks for. One that can't be imported is left out: others report it
    (`rewards.reward_problems`, and whoever calls it)."""
    asked: dict[str, Asked | None] = {}
    for name, term in recipe.ppo.terms.items():
        with suppress(UserError):
            asked[recipe.ppo.key_of(name)] = kind_of(term).asked(term)
    evaluation = recipe.evaluation
    for key, path in evaluation.functions:
        with suppress(UserError):
            asked[f"evaluation.{key}"] = asked_by(import_function(path))
    return {key: each for key, each in asked.items() if each is not None}


def column_problems(recipe: Recipe, there: Iterable[str], where: str, perhaps: Sequence[str] = ()) -> list[str]:
    """What the functions ask for and the prompts' rows lack, one sentence each. perhaps: columns that may turn up."""
    has = list(there)
    problems: list[str] = []
    for key, asked in asked_columns(recipe).items():
        missing = [name for name in asked.needed if name not in (*has, *perhaps, WHOLE)]
        if missing:
            problems.append(
                f"{key}: its function asks for {_words(missing)}, but {where} "
                f"{'has ' + _words(has) if has else 'has no column'} beside the prompt; give the rows that column, "
                "or the parameter a default"
            )
    return problems


def _words(names: Sequence[str]) -> str:
    return f"the column{'s' if len(names) > 1 else ''} {', '.join(repr(name) for name in names)}"
