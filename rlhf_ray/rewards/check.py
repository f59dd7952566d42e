"""What would stop the rewards of a recipe, found before anything starts: `rlhf-ray doctor`'s part of it. Loads no weights."""

from __future__ import annotations

from rlhf_ray.config import Recipe, RewardTerm
from rlhf_ray.config.recipe_file import function_names
from rlhf_ray.config.user_functions import import_function
from rlhf_ray.errors import UserError
from rlhf_ray.tables.rewards import kind_of


def reward_problems(recipe: Recipe) -> list[str]:
    """Of the functions that the recipe names, and of what else PPO's rewards need."""
    problems: list[str] = []
    for path in function_names(recipe):
        try:
            import_function(path)
        except UserError as error:
            problems.append(str(error))
    for name, term in recipe.ppo.terms.items():
        problems += kind_of(term).found_problems(recipe, recipe.ppo.key_of(name), term)
    return problems


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
