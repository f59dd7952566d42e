"""The stages of `pipeline.run_stages`, on Ray."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from rlhf_ray.actors.layout import Amounts
from rlhf_ray.actors.placement import altogether, check_fits, nodes_alive
from rlhf_ray.actors.weight_transport import planned_transport
from rlhf_ray.config import Recipe
from rlhf_ray.config.stage_table import STAGES
from rlhf_ray.config.user_functions import import_function
from rlhf_ray.errors import UserError
from rlhf_ray.runs.pipeline import StageFunction
from rlhf_ray.runs.run_folder import RunFolder

Progress = Callable[[dict], None]


def ray_stages() -> dict[str, StageFunction]:
    """Every stage's function, which is imported when it is called."""
    return {name: partial(_run_stage, name) for name in STAGES}


def _run_stage(name: str, recipe: Recipe, folder: RunFolder, progress: Progress) -> dict | None:
    return import_function(STAGES[name].run)(recipe, folder, name, progress)


def prepare_data(recipe: Recipe, folder: RunFolder, stage: str, progress: Progress) -> None:
    from rlhf_ray.data.dropped_rows import dropped_in_words, losses
    from rlhf_ray.data.prepare import prepare

    summary = prepare(recipe, folder)
    for line in dropped_in_words(summary):
        progress({"stage": stage, "say": line})
    for line in losses(summary):
        progress({"stage": stage, "say": line, "warns": True})
    for role, sources in summary["sources"].items():
        plain = sum(source.get("plain", 0) for source in sources)
        if plain:
            words = f"data.{role}: {plain} rows name special tokens, which are plain text there"
            progress({"stage": stage, "say": f"{words}; data.allow_special_tokens: true makes them tokens"})
    from rlhf_ray.ppo.step import check_enough

    rows = summary["roles"]["prompts"]["rows"]
    try:
        check_enough(rows, recipe.ppo.rollout_batch_size)
    except UserError:
        folder.stage(stage).done_file.unlink()  # so that the recipe's data may be corrected
        raise


def run_ppo_stage(recipe: Recipe, folder: RunFolder, stage: str, progress: Progress) -> None:
    from rlhf_ray.actors.ppo_stage import run_ppo

    run_ppo(recipe, folder, progress)


def evaluate_and_report(recipe: Recipe, folder: RunFolder, stage: str, progress: Progress) -> None:
    """Evaluate, then write the report."""
    from rlhf_ray.actors.evaluation import evaluate_in_an_actor
    from rlhf_ray.report.page import write_report

    evaluate_in_an_actor(recipe, folder, progress)
    write_report(folder)


def check_cluster(recipe: Recipe, stages: list[str]) -> None:
    """Refuse at start-up what the cluster can't fit, for the stages that are still to run."""
    problems = cluster_problems(recipe, stages, nodes_alive())
    if problems:
        raise UserError("\n".join(problems))


def cluster_problems(recipe: Recipe, stages: list[str], nodes: Sequence[Amounts]) -> list[str]:
    problems, cluster = [], altogether(nodes)
    for name, stage in recipe.trained.items():
        if name not in stages:
            continue
        for kind, each in (("CPU", stage.cpus_per_worker), ("GPU", stage.gpus_per_worker)):
            needed, there = stage.workers * each, cluster[kind]
            if needed > there:
                problems.append(
                    f"{name} needs {needed:g} {kind}s ({stage.workers} workers x {each:g}), the cluster has {there:g}; "
                    f"lower {name}.workers or {name}.{kind.lower()}s_per_worker, or add nodes"
                )
    if "ppo" in stages:
        try:
            planned_transport(recipe, check_fits(recipe.ppo_roles, nodes, recipe.resources.placement))
        except UserError as error:
            problems.append(str(error))
    return problems
