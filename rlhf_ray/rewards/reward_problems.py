"""What is wrong with a recipe's rewards: the reward part of `rlhf-ray doctor`. Loads no weights."""

from __future__ import annotations

from rlhf_ray.config import Recipe, RewardTerm
from rlhf_ray.config.user_functions import import_function
from rlhf_ray.errors import UserError
from rlhf_ray.tables.rewards import kind_of


def reward_problems(recipe: Recipe) -> list[str]:
    """Problems of PPO's rewards, the judge function and the trait function, one sentence each."""
    problems = []
    for name, term in recipe.ppo.terms.items():
        problems += kind_of(term).found_problems(recipe, recipe.ppo.key_of(name), term)
    for _, path in recipe.evaluation.functions:
        problems += _import_problems(path)
    return problems


def function_problems(recipe: Recipe, key: str, term: RewardTerm) -> list[str]:
    assert term.function is not None
    return _import_problems(term.function)


def model_problems(recipe: Recipe, key: str, term: RewardTerm) -> list[str]:
    """Problems of another reward model: it does not exist, or has no tokenizer."""
    from rlhf_ray.models.load import load_config  # loads transformers
    from rlhf_ray.models.tokenizer import load_tokenizer

    assert term.model is not None
    problems = []
    for load in (load_config, load_tokenizer):
        try:
            load(term.model, recipe.model.trust_remote_code)
        except UserError as error:
            problems.append(f"{key}.model: {error}")
    return list(dict.fromkeys(problems))  # neither is there where the model is not


def _import_problems(path: str) -> list[str]:
    try:
        import_function(path)
    except UserError as error:
        return [str(error)]
    return []
