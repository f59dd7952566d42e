"""`rlhf-ray doctor`: every problem of a run at once, and its plan of resources and memory."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rlhf_ray.actors.forking import wanted
from rlhf_ray.config import Recipe
from rlhf_ray.errors import UserError
from rlhf_ray.models.memory import FORKED, GB, IMPORTED, memory_plan, memory_problems, trained_by_role
from rlhf_ray.models.size import parameters
from rlhf_ray.recipe_file import check_resume, function_names, load_recipe
from rlhf_ray.threads import role_shares


def examine(
    recipe_name: str, overrides: list[str], run_dir: str | None, address: str | None, console: Console
) -> list[str]:
    """Print the plan; return the problems, one sentence each. Trains nothing, starts no actor."""
    from rlhf_ray.cli.running import absolute_paths, run_folder_of

    try:
        recipe = load_recipe(recipe_name, overrides)
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
        problems += _disk_problems(recipe, folder.path)
    problems += recipe_problems(recipe, hardware=address is None)
    nodes = check(_nodes, address) or []
    from rlhf_ray import kernels
    from rlhf_ray.actors.placement import altogether
    from rlhf_ray.actors.stages import cluster_problems
    from rlhf_ray.pipeline import stages_of

    if nodes:
        problems += cluster_problems(recipe, stages_of(recipe), nodes)
    cores = [int(node["CPU"]) for node in nodes if node.get("CPU", 0.0) >= 1.0]
    threads = role_shares(recipe, min(cores, default=1), max(1, len(cores)))
    _print_plan(recipe, altogether(nodes), threads, address is None and wanted(["ppo"]), console)
    if address is None and sys.platform == "linux" and kernels.library() is None:
        console.print(
            "without the functions in C (no compiler here, or they are switched off) CPUs are slower: apt-get install gcc"
        )
    elif address is None and (finding := kernels.blocks_finding()) is not None:
        console.print(
            f"bfloat16 products in C are {finding.times_as_fast:.2f} times as fast as torch's on this machine"
            + ("" if finding.good else f", with an error of {finding.error:.2g}: torch's are used")
        )
    if not problems:
        console.print("[green]nothing stands in the way[/]")
    return list(dict.fromkeys(problems))


def recipe_problems(recipe: Recipe, *, data: bool = True, hardware: bool = True) -> list[str]:
    """Problems of the data (unless it is prepared already), the model, the named functions and the precisions.

    hardware: whether the run computes on this machine, so that its hardware says which precisions there are and what fits,
    and what is installed here which engines.
    """
    from rlhf_ray.models.check import check_model

    problems = (_data_problems(recipe) if data else []) + check_model(recipe)
    problems += _function_problems(recipe) + _reward_problems(recipe)
    if not hardware:
        return problems
    return problems + _precision_problems(recipe) + _engine_problems(recipe) + _memory_problems(recipe)


def _nodes(address: str | None) -> list[Mapping[str, float]]:
    """Resources of each node of the cluster at `address`, or of this machine."""
    if address is None:
        import torch

        return [{"CPU": float(len(os.sched_getaffinity(0))), "GPU": float(torch.cuda.device_count())}]
    from rlhf_ray.actors.placement import nodes_alive
    from rlhf_ray.actors.session import ray_session

    with ray_session(address, stages=()):
        return nodes_alive()


def _data_problems(recipe: Recipe) -> list[str]:
    from rlhf_ray.data.check import check_data

    return check_data(recipe)


def _function_problems(recipe: Recipe) -> list[str]:
    from rlhf_ray.user_functions import import_function

    problems = []
    for path in function_names(recipe):
        try:
            import_function(path)
        except UserError as error:
            problems.append(str(error))
    return problems


def _reward_problems(recipe: Recipe) -> list[str]:
    """Reward models of others that ppo.rewards names: not there, or without a tokenizer. Loads no weights."""
    others = {name: term.model for name, term in recipe.ppo.rewards.items() if term.model not in (None, "reward")}
    if not others:
        return []
    from rlhf_ray.models.load import load_config
    from rlhf_ray.models.tokenizer import load_tokenizer

    problems = []
    for name, model in others.items():
        for load in (load_config, load_tokenizer):
            try:
                load(model, recipe.model.trust_remote_code)
            except UserError as error:
                problems.append(f"ppo.rewards.{name}.model: {error}")
    return problems


def _precision_problems(recipe: Recipe) -> list[str]:
    from rlhf_ray.engines.precision import resolve_precision

    stages = {name: getattr(recipe, name) for name in ("sft", "fluency", "reward", "judge", "dpo")}
    wanted = [(name, stage.precision, stage.gpus_per_worker) for name, stage in stages.items() if stage is not None]
    wanted += [
        ("ppo", recipe.ppo.precision, recipe.resources.policy.gpus),
        ("generation", recipe.generation.precision, recipe.resources.generation.gpus),
    ]
    problems = []
    for section, setting, gpus in wanted:
        try:
            resolve_precision(setting, "cuda" if gpus else "cpu")
        except UserError as error:
            problems.append(f"{section}.{error}")
    return problems


def _engine_problems(recipe: Recipe) -> list[str]:
    if recipe.generation.engine != "vllm":
        return []
    from rlhf_ray.engines.vllm_engine import vllm_problem

    problem = vllm_problem(recipe.resources.generation.gpus)
    return [] if problem is None else [problem]


def _memory_problems(recipe: Recipe) -> list[str]:
    import torch

    host = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    gpus = [torch.cuda.get_device_properties(number).total_memory for number in range(torch.cuda.device_count())]
    return memory_problems(recipe, host=host, gpus=gpus, itemsize=_itemsize(recipe, "cpu"), forked=wanted(["ppo"]))


def _itemsize(recipe: Recipe, kind: str) -> int:
    """Bytes of what PPO's roles compute in; a precision that this machine has not is another problem's."""
    from rlhf_ray.engines.precision import resolve_precision

    try:
        return resolve_precision(recipe.ppo.precision, kind).itemsize
    except UserError:
        return 4


def _disk_problems(recipe: Recipe, path: Path) -> list[str]:
    """Checkpoints hold what trains of policy and critic, and its two moments, in float32."""
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    checkpoint = 3 * sum(trained_by_role(recipe).values())
    needed = 4 * (checkpoint * (recipe.ppo.keep_checkpoints + 1) + 8 * parameters(recipe))
    if needed > free:
        return [
            f"{existing} has {free / GB:.1f} GB free, the run needs about {needed / GB:.1f} GB; choose another --run-dir"
        ]
    return [] if os.access(existing, os.W_OK) else [f"{existing} can't be written to; choose another --run-dir"]


def _print_plan(
    recipe: Recipe, cluster: dict[str, float], threads: Mapping[str, int], forked: bool, console: Console
) -> None:
    """forked: the actors' processes are forks of one."""
    console.print(
        f"[bold]{recipe.name}[/]: policy of about {parameters(recipe) / 1e6:.1f} M parameters; "
        f"the cluster has {cluster['CPU']:g} CPUs and {cluster['GPU']:g} GPUs"
    )
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("PPO role", "actors", "CPUs each", "GPUs each", "threads each", "memory, about"):
        table.add_column(column, justify="left" if column == "PPO role" else "right")
    for row in memory_plan(recipe, itemsize=_itemsize(recipe, "cpu")):
        role, memory = row.config, row.config.actors * ((FORKED if forked else IMPORTED) + row.model)
        numbers = f"{role.cpus:g}", f"{role.gpus:g}", str(role.threads or threads[row.role])
        table.add_row(row.role, str(role.actors), *numbers, f"{memory / GB:.1f} GB")
    console.print(table)
