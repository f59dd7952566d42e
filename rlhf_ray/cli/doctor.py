"""`rlhf-ray doctor`: every problem of a run at once, and its plan of resources and memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rich.console import Console

from rlhf_ray.actors.checks import disk_problems, left_on_cpus, memory_phases, recipe_problems
from rlhf_ray.actors.memory_plan import memory_problems
from rlhf_ray.actors.nodes import Node, cluster_nodes, rented_nodes, this_machine
from rlhf_ray.actors.ray_stages import cluster_problems
from rlhf_ray.actors.session import ray_session
from rlhf_ray.cli.plan_tables import print_plan
from rlhf_ray.config.problems import mentions
from rlhf_ray.config.recipe_file import RecipeError, load_recipe
from rlhf_ray.config.threads import role_shares, stage_shares
from rlhf_ray.data.paths import absolute_paths
from rlhf_ray.errors import UserError
from rlhf_ray.generation.acceleration import hindrance
from rlhf_ray.models.size import parameters
from rlhf_ray.runs.contents import to_tell
from rlhf_ray.runs.fetching import read_contents
from rlhf_ray.runs.pipeline import check_stage
from rlhf_ray.runs.remote import local_copy
from rlhf_ray.runs.remote_store import Store
from rlhf_ray.runs.resume import check_resume
from rlhf_ray.runs.run_folder import run_folder_of, working_copy


def examine(
    recipe_name: str, overrides: list[str], run_dir: str | None, address: str | None, rented: str | None, console: Console
) -> list[str]:
    """Print the plan; return the problems, one sentence each. Trains nothing, starts no actor.

    rented: nodes in words (`actors.nodes.rented_nodes`), in place of this machine or a cluster.
    """
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
    if folder is not None and folder.url is not None:
        there = check(_look_at_store, folder.url)
        folder = None if there is None else replace(folder, path=there)
    if folder is not None:
        check(check_resume, recipe, folder)
        for name in recipe.stages:
            if not folder.stage(name).done:
                check(check_stage, recipe, folder, name)
        problems += [] if rented else disk_problems(recipe, folder.path if folder.url is None else working_copy(folder.url))
    left = recipe.stages if folder is None else [name for name in recipe.stages if not folder.stage(name).done]
    there = check(nodes_of, address, rented) or []
    here = address is None and rented is None
    problems += recipe_problems(recipe, hardware=here)
    amounts = [node.amounts for node in there]
    if there:
        problems += cluster_problems(recipe, recipe.stages, amounts)
    cores = [int(node["CPU"]) for node in amounts if node.get("CPU", 0.0) >= 1.0]
    share = min(cores, default=1), max(1, len(cores))
    if parameters(recipe) > 0:  # else the model can't be read, and a plan of zeros would follow
        phases = memory_phases(recipe, there, here=here, stages=[*left, "serving"])
        print_plan(recipe, there, phases, (stage_shares(recipe, *share), role_shares(recipe, *share)), console)
        problems += memory_problems(recipe, there, [phase for phase in phases if phase.name != "serving"])
        for words in memory_problems(recipe, there, [phase for phase in phases if phase.name == "serving"]):
            console.print(f"[yellow]warning[/]: {words}")  # no part of the run
    for warning in left_on_cpus(recipe, there):
        console.print(f"[yellow]warning[/]: {warning}")
    if here and (words := hindrance()) is not None:
        console.print(words)
    if not problems:
        console.print("[green]nothing stands in the way[/]")
    return list(dict.fromkeys(problems))


def _look_at_store(url: str) -> Path:
    """UserError where it can't be written -> a copy of what says how far the run there is."""
    store = Store(url)
    store.check_writable()
    if read_contents(store) is None:
        return working_copy(url)
    return local_copy(url, to_tell)


def _beside(error: RecipeError) -> list[str]:
    """What is wrong with data, model and functions of a recipe that can't be used as it is."""
    if error.rest is None:
        return []
    try:
        found = recipe_problems(absolute_paths(error.rest), hardware=False)
    except UserError as other:
        found = str(other).splitlines()
    return [problem for problem in dict.fromkeys(found) if not mentions(problem, set(error.wrong))]


def nodes_of(address: str | None, rented: str | None) -> list[Node]:
    """The cluster at `address`, nodes such as one would rent, or this machine."""
    if rented is not None:
        if address is not None:
            raise UserError("--address and --nodes are both given: a plan is for a cluster or for nodes to come; leave one out")
        return rented_nodes(rented)
    if address is None:
        return [this_machine()]
    with ray_session(address, stages=()):
        return cluster_nodes()
