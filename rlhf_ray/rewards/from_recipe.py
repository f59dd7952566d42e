"""The scorers that a recipe asks for: those of PPO's rewards, and the independent judge. Only what is used is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from rlhf_ray.config import Recipe, RewardConfig, RewardTerm
from rlhf_ray.errors import UserError
from rlhf_ray.rewards.http_reward import http_reward
from rlhf_ray.rewards.isolated_function import IsolatedFunction
from rlhf_ray.rewards.scorer import EnsembleScorer, FunctionScorer, RewardScorer, Scorer, WeightedSum, WeightedTerm
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.tables.rewards import kind_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What a kind of reward (`tables.rewards`) makes its scorer from."""

    recipe: Recipe
    folder: RunFolder
    dtype: torch.dtype
    device: torch.device | str
    name: str  # the term's
    term: RewardTerm


def reward_scorer(recipe: Recipe, folder: RunFolder, dtype: torch.dtype, device: torch.device | str) -> Scorer:
    """The scorer of PPO's responses: the terms of ppo.rewards, else ppo.reward_function, else the reward model."""
    made: dict[str, Scorer] = {}  # model -> its scorer, once
    terms: dict[str, WeightedTerm] = {}
    for name, term in recipe.ppo.terms.items():
        scorer = None if term.model is None else made.get(term.model)
        if scorer is None:
            setting = Setting(recipe=recipe, folder=folder, dtype=dtype, device=device, name=name, term=term)
            scorer = kind_of(term).scorer(setting)
        if term.model is not None:
            made[term.model] = scorer
        terms[name] = WeightedTerm(term.weight, scorer)
    return WeightedSum(terms) if recipe.ppo.rewards else terms["reward"].scorer


# -- the kinds --------------------------------------------------------------------------------------------------------


def stage_models(setting: Setting) -> Scorer:
    return stage_scorer(setting.recipe, setting.folder, "reward", setting.dtype, setting.device)


def other_model(setting: Setting) -> Scorer:
    assert setting.term.model is not None
    return _model_scorer(setting.recipe, setting.term.model, setting.dtype, setting.device)


def reward_server(setting: Setting) -> Scorer:
    return http_reward(setting.term)


def function(setting: Setting) -> Scorer:
    assert setting.term.function is not None
    return FunctionScorer(setting.term.function)


def isolated_function(setting: Setting) -> Scorer:
    recipe, term = setting.recipe, setting.term
    assert term.function is not None and term.timeout_s is not None
    keys = ("ppo.reward_timeout_s", "ppo.reward_timeout_score")
    if recipe.ppo.rewards:
        keys = (f"ppo.rewards.{setting.name}.timeout_s", f"ppo.rewards.{setting.name}.timeout_score")
    return IsolatedFunction(term.function, timeout_s=term.timeout_s, timeout_score=term.timeout_score, keys=keys)


# -- the judge, and models --------------------------------------------------------------------------------------------


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


def reward_in_words(recipe: Recipe) -> str:
    """What PPO was rewarded by."""
    ppo, reward = recipe.ppo, recipe.reward
    if ppo.rewards:
        return " + ".join(f"{term.weight:g} {name}" for name, term in ppo.rewards.items())
    if ppo.reward_function is not None:
        return ppo.reward_function
    if reward is None or reward.members == 1:
        return "reward model"
    return f"{reward.members} reward models ({reward.combine})"
