"""What would stop a run, found before it starts. Trains nothing, starts no actor."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path

import torch

from rlhf_ray.actors.memory_plan import Phase, Precisions, memory_problems, phases_of
from rlhf_ray.actors.nodes import Node
from rlhf_ray.actors.worker_start import forks_here
from rlhf_ray.config import Precision, Recipe
from rlhf_ray.config.recipe_file import stage_functions
from rlhf_ray.config.user_functions import import_function
from rlhf_ray.errors import UserError
from rlhf_ray.models.memory import scorer_shapes, trained_by_role
from rlhf_ray.models.model_problems import check_model
from rlhf_ray.models.planned_process import GB
from rlhf_ray.models.size import parameters
from rlhf_ray.tables.engines import ENGINES
from rlhf_ray.training.precision import resolve_precision


def recipe_problems(recipe: Recipe, *, data: bool = True, hardware: bool = True) -> list[str]:
    """Problems of the data (unless it is prepared already), the model, the named functions and the precisions.

    hardware: whether the run computes on this machine. Then its hardware says which precisions there are, and its packages say
    which engines there are.
    """
    problems = (_data_problems(recipe) if data else []) + check_model(recipe)
    problems += _reward_problems(recipe) + _stage_problems(recipe)
    if not hardware:
        return problems
    return problems + _precision_problems(recipe) + _engine_problems(recipe)


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


def memory_phases(recipe: Recipe, nodes: Sequence[Node], *, here: bool, stages: Collection[str]) -> list[Phase]:
    """The memory plan of the stages that are to run. here: the nodes are this machine."""
    return phases_of(recipe, nodes, precisions_of(recipe), stages=stages, forked=here and forks_here(["ppo"]))


def check_memory(recipe: Recipe, nodes: Sequence[Node], *, here: bool, stages: Collection[str]) -> None:
    """UserError for what the nodes can't hold."""
    problems = memory_problems(recipe, nodes, memory_phases(recipe, nodes, here=here, stages=stages))
    if problems:
        raise UserError("\n".join(problems))


def precisions_of(recipe: Recipe) -> Precisions:
    """As far as this machine can say; of GPUs elsewhere it is assumed that they multiply in bfloat16."""
    return Precisions(
        ppo=_itemsize(recipe.ppo.precision, "cpu"), ppo_gpu=_itemsize(recipe.ppo.precision, "cuda"),
        evaluation=2 if recipe.ppo.precision == "bfloat16" else 4, serving=_itemsize("auto", "cpu"),
        stages={name: _itemsize(stage.precision, "cuda" if stage.gpus_per_worker else "cpu")
                for name, stage in recipe.trained.items()},
    )  # fmt: skip


def left_on_cpus(recipe: Recipe, nodes: Sequence[Node]) -> list[str]:
    """Warnings: who computes on CPUs where GPUs are used, or there and not used."""
    roles = {name: role for name, role in recipe.ppo_roles.items() if name != "reward" or scorer_shapes(recipe)}
    with_gpus = [name for name, role in roles.items() if role.gpus > 0]
    without = [f"resources.{name}.gpus" for name in roles if name not in with_gpus]
    stages = [f"{name}.gpus_per_worker" for name, stage in recipe.trained.items() if stage.gpus_per_worker == 0]
    there = sum(node.amounts.get("GPU", 0.0) for node in nodes)
    if not with_gpus and len(stages) == len(recipe.trained):
        return [f"there are {there:g} GPUs, and the recipe uses none: set resources.*.gpus and *.gpus_per_worker"] if there else []
    words = [f"{key} is 0, so {key.split('.')[-2]} computes on CPUs" for key in (*without, *stages)]
    return [f"{each}, while others have GPUs; set it to 1, or to a share of another role's (resources.<role>.with)"
            if each.startswith("resources") else f"{each}, while others have GPUs; set it to 1" for each in words]  # fmt: skip


def _itemsize(precision: Precision, kind: str) -> int:
    """Another check reports a precision that this machine lacks."""
    if kind == "cuda" and not torch.cuda.is_available():
        return 4 if precision == "float32" else 2
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
