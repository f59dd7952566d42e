"""One rank of a supervised stage, in a process of Ray Train."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from ray.train import get_context

from rlhf_ray.actors.garbage_collection import collector_paused
from rlhf_ray.actors.process import set_up_process
from rlhf_ray.actors.worker_watch import note_process
from rlhf_ray.config import Recipe
from rlhf_ray.config.stage_table import STAGES
from rlhf_ray.config.user_functions import import_function
from rlhf_ray.errors import NotFinite, UserError
from rlhf_ray.runs.elsewhere import arrive, handing_in, stage_files
from rlhf_ray.runs.run_folder import RunFolder


def train_in_worker(config: dict) -> dict:
    """One rank, in its own process -> the stage's summary, or {"refused" or "not_finite": sentence}."""
    folder, stage = RunFolder(Path(config["folder"]), config["url"], config["session"]), config["stage"]
    recipe = Recipe.model_validate(config["recipe"])
    section = recipe.trained[stage]
    device = set_up_process(stage, folder.logs, threads=section.threads, gpus=section.gpus_per_worker)
    note_process(processes_of(folder, stage, config["member"]), get_context().get_world_rank())
    print(f"{stage} worker: process {os.getpid()} on {platform.node()}", flush=True)
    arrive(folder, stage_files(stage))
    with collector_paused():
        train = _training(stage, config["member"], device.type)
    hands_in = handing_in(folder, stage) if get_context().get_world_rank() == 0 else nullcontext()
    try:
        with hands_in:
            return train(recipe, folder, stage)
    except UserError as error:  # returned: raised, it would be retried as if a machine had failed
        return {"refused": str(error)}
    except NotFinite as error:
        return {"not_finite": str(error)}


def _training(stage: str, member: int, device_type: str) -> Callable[[Recipe, RunFolder, str], dict]:
    """Import what trains the stage: DeepSpeed first, then TRL."""
    from rlhf_ray.training.distributed import prepare_deepspeed

    prepare_deepspeed(device_type)
    path = STAGES[stage].train
    assert path is not None, stage
    train = import_function(path)
    return partial(train, member=member) if member else train


def processes_of(folder: RunFolder, stage: str, member: int) -> Path:
    return folder.logs / "ray_train" / f"{stage}_{member}.processes"
