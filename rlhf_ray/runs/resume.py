"""Whether a recipe may continue in a run folder that was started with another recipe."""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import Any

import yaml

from rlhf_ray.config import Recipe
from rlhf_ray.config.recipe_file import build_recipe, flatten, read_yaml
from rlhf_ray.config.stage_table import ALWAYS, STAGES
from rlhf_ray.errors import UserError
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.runs.storage import write_atomically

#: Keys that may change when a run is resumed. A change of other keys would mix two experiments in one folder.
SAFE_ON_RESUME = (
    "name", "plugins", "ppo.steps", "ppo.patience", "ppo.kl_coef", "ppo.adaptive_kl*", "ppo.learning_rate",
    "ppo.critic_learning_rate", "ppo.anneal", "ppo.clip_range", "ppo.value_clip_range", "ppo.eval_every",
    "ppo.checkpoint_*", "ppo.keep_checkpoints", "ppo.publish_*", "ppo.max_mismatch*", "ppo.max_first_approx_kl",
    "ppo.reward_timeout_s", "ppo.rewards.*.timeout_s", "ppo.rewards.*.url", "ppo.rewards.*.retries",
    "ppo.accept_weak_reward", "ppo.precision", "generation.precision", "generation.engine", "resources.*", "rounds.*", "tracking.*",
    "evaluation.*", "*.learning_rate", "*.max_steps", "*.max_minutes", "*.checkpoint_minutes", "*.workers",
    "*.cpus_per_worker", "*.gpus_per_worker",
    "*.threads", "*.zero_stage", "*.gradient_checkpointing",
)  # fmt: skip


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Write the recipe with every default."""
    write_atomically(path, yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


def recorded_recipe(folder: RunFolder) -> Recipe | None:
    """The recipe that the run folder was last used with. Keys that a newer package version added have defaults."""
    if not folder.recipe.exists():
        return None
    try:
        values = read_yaml(str(folder.recipe))
    except UserError as error:
        raise UserError(f"{error}; delete it to go on with the recipe that you give, which must be the one of this run") from error
    try:
        return build_recipe(values, [], str(folder.recipe))
    except UserError as error:  # e.g. a plugin of it that is gone
        raise UserError(f"{folder.recipe}: {error}") from error


def check_resume(recipe: Recipe, folder: RunFolder) -> list[str]:
    """The keys that changed since the run folder was started. UserError names those that may not change."""
    recorded = recorded_recipe(folder)
    if recorded is None:
        return []
    old = flatten(recorded.model_dump(mode="json"))
    new = flatten(recipe.model_dump(mode="json"))
    changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    # Where the recipe leaves threads open, the recorded number applies (`threads.settle_threads`).
    changed = [key for key in changed if not (key.endswith(".threads") and None in (old.get(key), new.get(key)))]
    if not folder.stage("data").done:
        return changed  # nothing was made with the old recipe yet
    ppo = folder.stage("ppo")
    ppo_stays = ppo.done and not ppo_goes_on(recipe, ppo.summary("steps"))
    refused = [key for key in changed if not _may_change(key, folder, ppo_stays)]
    judging = recipe.ppo.judge_evaluations and ppo.path.exists() and not ppo_stays
    if judging and "evaluation.judge_function" in changed:
        refused.append("evaluation.judge_function")  # the best score under one judge can't be compared with another's
    if refused:
        parts = ", ".join(f"{key} ({old.get(key)!r} -> {new.get(key)!r})" for key in refused)
        raise UserError(
            f"{folder.path} was started with another recipe: {parts} can't change on resume; "
            "set them back, or choose another --run-dir"
        )
    return changed


def ppo_goes_on(recipe: Recipe, done: dict[str, Any]) -> bool:
    """Whether a PPO stage that ended with these closing figures has steps left under this recipe."""
    if recipe.ppo.steps <= done["steps"]:
        return False
    patience = recipe.ppo.patience
    return done.get("ended_by") != "patience" or patience is None or patience > done.get("worse_since", 0)


def _may_change(key: str, folder: RunFolder, ppo_stays: bool) -> bool:
    section = key.partition(".")[0]
    if section == "ppo" and ppo_stays:
        return key == "ppo.steps"  # `pipeline.reopen_finished` checks the number
    if section in STAGES and section not in ALWAYS and folder.stage(section).done:
        return False  # recipe.yaml would no longer say how the stage was trained
    if any(fnmatch.fnmatchcase(key, pattern) for pattern in SAFE_ON_RESUME):
        return True
    return section in STAGES and section != "data" and not folder.stage(section).path.exists()
