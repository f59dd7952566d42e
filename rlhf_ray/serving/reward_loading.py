"""From a reward model's folder, or that of a run's ensemble, to a runner that scores."""

from __future__ import annotations

from pathlib import Path

import torch

from rlhf_ray.config.recipe_file import load_recipe
from rlhf_ray.config.user_functions import import_plugins
from rlhf_ray.rewards.from_recipe import stage_scorer
from rlhf_ray.rewards.scorer import RewardScorer, Scorer
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.serving.config import EngineOptions, Limits
from rlhf_ray.serving.reward_app import RewardRunner
from rlhf_ray.training.precision import resolve_precision


def load_reward(options: EngineOptions, limits: Limits) -> RewardRunner:
    """UserError for a folder that holds no usable reward model."""
    torch.set_num_threads(options.threads)
    import_plugins(options.plugins)
    return RewardRunner(_scorer(options), options.model, limits, options.trust_remote_code)


def _scorer(options: EngineOptions) -> Scorer:
    dtype = resolve_precision(options.precision, options.device)
    folder = Path(options.model)
    run = RunFolder(folder.parent.parent)
    if run.stage("reward").model == folder and run.recipe.is_file():
        recipe = load_recipe(str(run.recipe))
        if recipe.reward is not None and recipe.reward.members > 1:
            return stage_scorer(recipe, run, "reward", dtype, options.device)
    return RewardScorer(
        folder, compute_dtype=dtype, device=options.device, trust_remote_code=options.trust_remote_code
    )
