"""What would stop a run, found before it starts. Trains nothing, starts no actor."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from pathlib import Path

import torch

from rlhf_ray.actors.worker_start import forks_here
from rlhf_ray.config import Precision, Recipe
from rlhf_ray.config.recipe_file import stage_functions
from rlhf_ray.config.user_functions import import_function
from rlhf_ray.errors import UserError
from rlhf_ray.models.memory import GB, memory_problems, trained_by_role
from rlhf_ray.models.model_problems import check_model
from rlhf_ray.models.size import parameters
from rlhf_ray.models.stage_memory import stage_memory_problems
from rlhf_ray.tables.engines import ENGINES
from rlhf_ray.training.precision import resolve_precision


def recipe_problems(
    recipe: Recipe, *, data: bool = True, hardware: bool = True, stages: Collection[str] | None = None
) -> list[str]:
    """Problems of the data (unless it is prepared already), the model, the named functions and the precisions.

    hardware: whether the run computes on this machine. Then its hardware says which precisions there are and what fits,
    and its packages say which engines there are. stages: those that are to run (None: all of the recipe's); the others need no
    memory any more.
    """
    problems = (_data_problems(recipe) if data else []) + check_model(recipe)
    problems += _reward_problems(recipe) + _stage_problems(recipe)
    if not hardware:
        return problems
    problems += _precision_problems(recipe) + _engine_problems(recipe)
    return problems + _memory_problems(recipe, recipe.stages if stages is None else stages)


def _data_problems(recipe: Recipe) -> list[str]:
    from rlhf_ray.data.data_problems import check_data  # loads datasets

    return check_data(recipe)


def _reward_problems(recipe: Recipe) -> list[str]:
    from rlhf_ray.rewards.reward_problems import reward_problems

    return reward_problems(recipe)


def _stage_problems(recipe: Recipe) -> list[str]:
    problems = []
    for path in stage_functions(recipe):
        try:
            import_function(path)
        except UserError as error:
            problems.append(str(error))
    return problems


def _precision_problems(recipe: Recipe) -> list[str]:
    settings: list[tuple[str, Precision, float]]
    settings = [(name, stage.precision, stage.gpus_per_worker) for name, stage in recipe.trained.items()]
    settings.extend([
        ("ppo", recipe.ppo.precision, recipe.resources.policy.gpus),
        ("generation", recipe.generation.precision, recipe.resources.generation.gpus),
    ])  # fmt: skip
    problems = []
    for section, setting, gpus in settings:
        try:
            resolve_precision(setting, "cuda" if gpus else "cpu")
        except UserError as error:
            problems.append(f"{section}.{error}")
    return problems


def _engine_problems(recipe: Recipe) -> list[str]:
    problem = ENGINES.named(recipe.generation.engine).problem_here(recipe.resources.generation.gpus)
    return [] if problem is None else [problem]


def _memory_problems(recipe: Recipe, stages: Collection[str]) -> list[str]:
    host = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    gpus = [torch.cuda.get_device_properties(number).total_memory for number in range(torch.cuda.device_count())]
    found = stage_memory_problems(recipe, host=host, itemsizes=stage_itemsizes(recipe), stages=stages)
    if "ppo" in stages:
        found += memory_problems(recipe, host=host, gpus=gpus, itemsize=itemsize_of(recipe, "cpu"), forked=forks_here(["ppo"]))
    return found


def stage_itemsizes(recipe: Recipe) -> dict[str, int]:
    """Supervised stage -> bytes of a number in its precision."""
    return {name: _itemsize(stage.precision, "cuda" if stage.gpus_per_worker else "cpu") for name, stage in recipe.trained.items()}


def itemsize_of(recipe: Recipe, kind: str) -> int:
    """Bytes of a number in PPO's precision."""
    return _itemsize(recipe.ppo.precision, kind)


def _itemsize(precision: Precision, kind: str) -> int:
    """Another check reports a precision that this machine lacks."""
    try:
        return resolve_precision(precision, kind).itemsize
    except UserError:
        return 4


def disk_problems(recipe: Recipe, path: Path) -> list[str]:
    """Checkpoints hold the trained weights of policy and critic, and their two moments, in float32."""
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    checkpoint = 3 * sum(trained_by_role(recipe).values())
    needed = 4 * (checkpoint * (recipe.ppo.keep_checkpoints + 1) + 8 * parameters(recipe))
    if needed > free:
        return [
            f"{existing} has {free / GB:.1f} GB free, the run needs about {needed / GB:.1f} GB; choose another --run-dir"
        ]
    return [] if os.access(existing, os.W_OK) else [f"{existing} can't be written to; choose another --run-dir"]
