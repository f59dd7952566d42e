"""The traits of responses, as the function that `evaluation.trait_function` names sees them.   N responses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from rlhf_ray.config.columns import NO_COLUMNS, Columns, asked_by
from rlhf_ray.config.user_functions import import_function
from rlhf_ray.errors import UserError
from rlhf_ray.rewards.returned import NotNumbers, numbers_of


def all_trait_scores(
    paths: Sequence[str], prompts: Sequence[str], responses: Sequence[str], columns: Columns = NO_COLUMNS
) -> dict[str, np.ndarray]:
    """`trait_scores` of several functions. UserError if two of them return a trait of one name."""
    scores: dict[str, np.ndarray] = {}
    source: dict[str, str] = {}
    for path in paths:
        for name, values in trait_scores(path, prompts, responses, columns).items():
            if name in scores:
                raise UserError(
                    f"evaluation.trait_function: {source[name]} and {path} both return a trait '{name}'; rename one of them"
                )
            scores[name], source[name] = values, path
    return scores


def trait_scores(
    path: str, prompts: Sequence[str], responses: Sequence[str], columns: Columns = NO_COLUMNS
) -> dict[str, np.ndarray]:
    """trait -> its score of each response, [N]. UserError unless the function returns N finite numbers per trait.

    columns: the prompts' other columns, of which the function gets those that it asks for
    """
    function = import_function(path)
    own = {name: list(values) for name, values in asked_by(function).of(columns, prompts).items()}
    try:
        found = function(list(prompts), list(responses), **own)
    except Exception as error:  # fault boundary: the user's code may raise anything
        raise UserError(f"evaluation.trait_function {path} raised {type(error).__name__}: {error}") from error
    if not isinstance(found, Mapping) or not found or not all(isinstance(name, str) and name for name in found):
        raise UserError(
            f"evaluation.trait_function {path} returned {found!r:.80}; return {{name: scores}}, one number for each response"
        )
    scores = {}
    for name, values in found.items():
        try:
            scores[name] = np.array(numbers_of(values, len(responses)), np.float64)
        except NotNumbers as wrong:
            told = "" if wrong.place is None else f" of response {responses[wrong.place]!r}"
            raise UserError(
                f"evaluation.trait_function {path} returned {wrong} as '{name}'{told}; return one number for each response"
            ) from None
        if not np.isfinite(scores[name]).all():
            bad = int(np.flatnonzero(~np.isfinite(scores[name]))[0])
            raise UserError(
                f"evaluation.trait_function {path} returned {scores[name][bad]} as '{name}' of response {responses[bad]!r}"
            )
    return scores
