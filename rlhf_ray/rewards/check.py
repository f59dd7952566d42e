"""What would stop the rewards of a recipe, found before anything starts: `rlhf-ray doctor`'s part of it. Loads no weights."""

from __future__ import annotations

from rlhf_ray.config import Recipe, RewardTerm
from rlhf_ray.config.user_functions import import_function
from rlhf_ray.errors import UserError
from rlhf_ray.tables.rewards import kind_of


def reward_problems(recipe: Recipe) -> list[str]:
    """Of PPO's rewards, and of the judge's and the trait function."""
    problems = []
    for name, term in recipe.ppo.terms.items():
        problems += kind_of(term).found_problems(recipe, recipe.ppo.key_of(name), term)
    for path in (recipe.evaluation.judge_function, recipe.evaluation.trait_function):
        problems += [] if path is None else _import_problems(path)
    return problems


def function_problems(recipe: Recipe, key: str, term: RewardTerm) -> list[str]:
    assert term.function is not None
    return _import_problems(term.function)


def model_problems(recipe: Recipe, key: str, term: RewardTerm) -> list[str]:
    """A reward model of others: not there, or without a tokenizer."""
    from rlhf_ray.models.load import load_config  # loads transformers
    from rlhf_ray.models.tokenizer import load_tokenizer

    assert term.model is not None
    problems = []
    for load in (load_config, load_tokenizer):
        try:
            load(term.model, recipe.model.trust_remote_code)
        except UserError as error:
            problems.append(f"{key}.model: {error}")
    return problems


def _import_problems(path: str) -> list[str]:
    try:
        import_function(path)
    except UserError as error:
        return [str(error)]
    return []
