"""The recipe of a round: the run's own, with its votes, from the policy of the round before."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_ray.config import Recipe
from rlhf_ray.config.base import SEEDS
from rlhf_ray.config.recipe_file import build_recipe
from rlhf_ray.config.stage_table import BUILT_IN, policies
from rlhf_ray.errors import UserError
from rlhf_ray.runs.run_folder import RunFolder, start_model

KEPT = ("fluency", "judge")  # measures of the run, which its rounds take over: their figures compare


def round_recipe(
    first: Recipe, run: RunFolder, number: int, start: Path, votes: str | None, overrides: Sequence[str] = ()
) -> Recipe:
    """first: the run's recipe. start: the policy that the round trains. votes: the database; None: the recipe's own.

    UserError for a run without a reward model that people's votes could train, and for no database.
    """
    values: dict[str, Any] = first.model_dump(mode="json", include=set(Recipe.model_fields))
    given = dict(values["data"]["votes"] or {}) | ({} if votes is None else {"url": votes})
    if "url" not in given:
        raise UserError(f"the recipe of {run.path} has no data.votes; say where they are: --votes votes.db")
    values["data"]["votes"] = given | {"evaluate": True}
    values["name"] = f"{first.name}-round-{number}"
    told = build_recipe(values, list(overrides), str(run.recipe))
    if told.reward is None or not told.ppo.uses_reward_model:
        raise UserError(
            f"the recipe of {run.path} rewards PPO without a reward model of its own, and votes train nothing else; give it a "
            "section 'reward', and ppo.rewards a term with model: reward"
        )
    values, origin = told.model_dump(mode="json", include=set(Recipe.model_fields)), start_model(first, run)
    values |= {name: None for name in policies() if name != "ppo" and name in values}  # PPO begins from the last round's policy
    values["model"]["name_or_path"] = str(start)
    for name in ("reward", "judge"):
        if values[name] is not None and values[name]["base"] in ("sft", "model"):
            from_sft = values[name]["base"] == "sft" or first.model.is_from_scratch
            values[name]["base"] = origin if from_sft else first.model.name_or_path
    values["ppo"]["reference"] = origin if told.rounds.reference == "first" else None
    if told.ppo.seed is None or told.ppo.seed == first.ppo.seed:
        values["ppo"]["seed"] = (first.ppo_seed + number - 1) % SEEDS  # no two rounds draw the same random numbers
    return build_recipe(values, [], str(run.recipe))


def is_kept(recipe: Recipe, name: str) -> bool:
    return name in KEPT and name in BUILT_IN and recipe.section(name) is not None
