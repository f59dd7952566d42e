"""The scorers that a recipe asks for: what PPO is paid by, and the independent judge. Only what is used is loaded."""

from __future__ import annotations

from pathlib import Path

import torch

from rlhf_ray.config import Recipe, RewardConfig, RewardTerm
from rlhf_ray.errors import UserError
from rlhf_ray.rewards.isolated_function import IsolatedFunction
from rlhf_ray.rewards.scorer import EnsembleScorer, FunctionScorer, RewardScorer, Scorer, WeightedSum, WeightedTerm
from rlhf_ray.runs.run_folder import RunFolder


def reward_scorer(recipe: Recipe, folder: RunFolder, dtype: torch.dtype, device: torch.device | str) -> Scorer:
    """What PPO is paid by: the terms of ppo.rewards, else ppo.reward_function, else the reward model."""
    made: dict[str, Scorer] = {}  # model -> its scorer, once

    def scorer_of(name: str, term: RewardTerm) -> Scorer:
        if term.function is not None:
            return _function_scorer(recipe, name, term)
        if term.model not in made:
            made[term.model] = (
                stage_scorer(recipe, folder, "reward", dtype, device)
                if term.model == "reward"
                else _model_scorer(recipe, term.model, dtype, device)
            )
        return made[term.model]

    terms = {name: WeightedTerm(term.weight, scorer_of(name, term)) for name, term in recipe.ppo.terms.items()}
    return WeightedSum(terms) if recipe.ppo.rewards else terms["reward"].scorer


def judge_scorer(recipe: Recipe, folder: RunFolder, dtype: torch.dtype, device: torch.device | str) -> Scorer | None:
    """The judge: evaluation.judge_function (the known true utility), else the judge stage's model, else None."""
    if recipe.evaluation.judge_function is not None:
        return FunctionScorer(recipe.evaluation.judge_function)
    if recipe.judge is not None:
        return stage_scorer(recipe, folder, "judge", dtype, device)
    return None


def stage_scorer(
    recipe: Recipe, folder: RunFolder, stage: str, dtype: torch.dtype, device: torch.device | str
) -> Scorer:
    """The model that the stage "reward" or "judge" trained, or the ensemble of them."""
    config = recipe.section(stage)
    assert isinstance(config, RewardConfig)
    paths = [folder.stage(stage).member(number).model for number in range(config.members)]
    for path in paths:
        if not path.exists():
            raise UserError(f"{path} is not there; run the stage '{stage}' first")
    members = [_model_scorer(recipe, path, dtype, device) for path in paths]
    return members[0] if len(members) == 1 else EnsembleScorer(members, combine=config.combine, std=config.combine_std)


def _model_scorer(recipe: Recipe, model: str | Path, dtype: torch.dtype, device: torch.device | str) -> RewardScorer:
    trust = recipe.model.trust_remote_code
    return RewardScorer(model, compute_dtype=dtype, device=device, trust_remote_code=trust)


def _function_scorer(recipe: Recipe, name: str, term: RewardTerm) -> Scorer:
    if term.timeout_s is None:
        return FunctionScorer(term.function)
    keys = ("ppo.reward_timeout_s", "ppo.reward_timeout_score")
    if recipe.ppo.rewards:
        keys = (f"ppo.rewards.{name}.timeout_s", f"ppo.rewards.{name}.timeout_score")
    return IsolatedFunction(term.function, timeout_s=term.timeout_s, timeout_score=term.timeout_score, keys=keys)
