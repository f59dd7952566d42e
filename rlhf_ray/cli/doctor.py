"""`rlhf-ray doctor`: every problem of a run at once, and its plan of resources and memory."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from rich.console import Console
from rich.table import Table

from rlhf_ray.actors.checks import disk_problems, itemsize_of, recipe_problems, stage_itemsizes
from rlhf_ray.actors.placement import altogether, nodes_alive
from rlhf_ray.actors.ray_stages import cluster_problems
from rlhf_ray.actors.session import ray_session
from rlhf_ray.actors.worker_start import forks_here
from rlhf_ray.config import Recipe
from rlhf_ray.config.problems import mentions
from rlhf_ray.config.recipe_file import RecipeError, load_recipe
from rlhf_ray.config.run_names import names_of
from rlhf_ray.config.stage_table import STAGES
from rlhf_ray.config.threads import role_shares, stage_shares
from rlhf_ray.data.paths import absolute_paths
from rlhf_ray.errors import UserError
from rlhf_ray.generation.acceleration import hindrance
from rlhf_ray.models.memory import FORKED, GB, IMPORTED, memory_plan, support_store_bytes, support_tokens
from rlhf_ray.models.size import parameters
from rlhf_ray.models.stage_memory import stage_memory_plan
from rlhf_ray.runs.pipeline import check_stage
from rlhf_ray.runs.resume import check_resume
from rlhf_ray.runs.run_folder import run_folder_of


def examine(
    recipe_name: str, overrides: list[str], run_dir: str | None, address: str | None, console: Console
) -> list[str]:
    """Print the plan; return the problems, one sentence each. Trains nothing, starts no actor."""
    try:
        recipe = load_recipe(recipe_name, overrides)
    except RecipeError as error:
        return [*str(error).splitlines(), *_beside(error)]
    except UserError as error:
        return str(error).splitlines()
    problems: list[str] = []

    def check(function, *args):
        try:
            return function(*args)
        except UserError as error:
            problems.extend(str(error).splitlines())
            return None

    recipe = check(absolute_paths, recipe) or recipe
    folder = check(run_folder_of, recipe, run_dir)
    if folder is not None:
        check(check_resume, recipe, folder)
        for name in recipe.stages:
            if not folder.stage(name).done:
                check(check_stage, recipe, folder, name)
        problems += disk_problems(recipe, folder.path)
    left = recipe.stages if folder is None else [name for name in recipe.stages if not folder.stage(name).done]
    problems += recipe_problems(recipe, hardware=address is None, stages=left)
    nodes = check(_nodes, address) or []
    if nodes:
        problems += cluster_problems(recipe, recipe.stages, nodes)
    cores = [int(node["CPU"]) for node in nodes if node.get("CPU", 0.0) >= 1.0]
    share = min(cores, default=1), max(1, len(cores))
    threads = role_shares(recipe, *share), stage_shares(recipe, *share)
    if parameters(recipe) > 0:  # else the model can't be read, and a plan of zeros would follow
        _print_plan(recipe, altogether(nodes), *threads, address is None and forks_here(["ppo"]), console)
    if address is None and (words := hindrance()) is not None:
        console.print(words)
    if not problems:
        console.print("[green]nothing stands in the way[/]")
    return list(dict.fromkeys(problems))


def _beside(error: RecipeError) -> list[str]:
    """What is wrong with data, model and functions of a recipe that can't be used as it is."""
    if error.rest is None:
        return []
    try:
        found = recipe_problems(absolute_paths(error.rest), hardware=False)
    except UserError as other:
        found = str(other).splitlines()
    return [problem for problem in dict.fromkeys(found) if not mentions(problem, set(error.wrong))]


def _nodes(address: str | None) -> list[Mapping[str, float]]:
    """Resources of each node of the cluster at `address`, or of this machine."""
    if address is None:
        return [{"CPU": float(len(os.sched_getaffinity(0))), "GPU": float(torch.cuda.device_count())}]
    with ray_session(address, stages=()):
        return nodes_alive()


def _print_plan(
    recipe: Recipe,
    cluster: dict[str, float],
    threads: Mapping[str, int],
    stage_threads: Mapping[str, int],
    forked: bool,
    console: Console,
) -> None:
    """forked: the actors' processes are forks of one."""
    console.print(
        f"[bold]{recipe.name}[/]: policy of {parameters(recipe) / 1e6:.1f} M parameters; "
        f"the cluster has {cluster['CPU']:g} CPUs and {cluster['GPU']:g} GPUs"
    )
    names = names_of(recipe.model_dump(mode="json"))
    words = [names.told(STAGES[name].words) if name == "ppo" else STAGES[name].words for name in recipe.stages]
    console.print(f"stages: {', '.join(words)}")
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("stage or role", "processes", "CPUs each", "GPUs each", "threads each", "memory, about"):
        table.add_column(column, justify="left" if column == "stage or role" else "right")
    for stage in stage_memory_plan(recipe, stage_itemsizes(recipe)):
        section = recipe.trained[stage.stage]
        numbers = f"{section.cpus_per_worker:g}", f"{stage.gpus:g}", str(section.threads or stage_threads[stage.stage])
        table.add_row(stage.stage, str(stage.workers), *numbers, f"{stage.workers * stage.worker / GB:.1f} GB")
    for row in memory_plan(recipe, itemsize=itemsize_of(recipe, "cpu")):
        role, memory = row.config, row.config.actors * ((FORKED if forked else IMPORTED) + row.model)
        numbers = f"{role.cpus:g}", f"{role.gpus:g}", str(role.threads or threads[row.role])
        table.add_row(f"{names.told('PPO')}: {row.role}", str(role.actors), *numbers, f"{memory / GB:.1f} GB")
    console.print(table)
    if support := support_tokens(recipe):
        console.print(
            f"truncated sampling: each token of a response is drawn among at most {support} tokens, which the memory above counts; "
            f"they take at most {support_store_bytes(recipe, support) / GB:.1f} GB more in Ray's object store "
            "(generation.top_k bounds them)"
        )
