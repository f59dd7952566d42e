"""What the fork server and its branches import, each process as much as it can share: the server all but Ray, a branch Ray too."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Iterable, Sequence

from rlhf_ray.forking.ray_internals import WORKER_MODULES

#: of a stage's workers, without Ray
LIBRARIES = {
    "supervised": ("rlhf_ray.supervised.sft", "rlhf_ray.supervised.reward_model", "rlhf_ray.supervised.dpo"),
    "ppo": (
        "rlhf_ray.roles.generator", "rlhf_ray.roles.reward", "rlhf_ray.rewards.from_recipe", "rlhf_ray.roles.reference_policy",
        "rlhf_ray.roles.experience_maker", "rlhf_ray.roles.policy_trainer", "rlhf_ray.roles.critic_trainer",
        "rlhf_ray.roles.configs", "rlhf_ray.training.forward", "rlhf_ray.training.deepspeed_engine", "rlhf_ray.models.critic",
        "rlhf_ray.models.load", "rlhf_ray.models.trained_part",
        "rlhf_ray.data.role_files", "rlhf_ray.evaluation.evaluate",
    ),
    "serving": ("rlhf_ray.serving.loading", "rlhf_ray.serving.app"),
}  # fmt: skip
#: of a stage's workers, with Ray
ACTORS = {
    "supervised": ("rlhf_ray.actors.supervised",),
    "ppo": ("rlhf_ray.actors.role_actors", "rlhf_ray.actors.trainer_actors"),
    "serving": ("rlhf_ray.serving.deployment",),
}
REQUEST_S = 5.0  # within which a client has sent all of its request


def import_libraries(stages: Sequence[str]) -> None:
    gc.disable()  # until all is there
    if {"supervised", "ppo"} & set(stages):
        importlib.import_module("rlhf_ray.training.distributed").prepare_deepspeed("cpu")  # before TRL
    _import_all(module for stage in stages for module in LIBRARIES[stage])


def import_actors(stages: Sequence[str]) -> None:
    ours = (module for stage in stages for module in ACTORS[stage])
    rays = (module for stage in stages for module in WORKER_MODULES.get(stage, ()))
    _import_all((*WORKER_MODULES["all"], *ours, *rays))


def _import_all(modules: Iterable[str]) -> None:
    """Without garbage collection, which would go over these hundreds of thousands of objects again and again."""
    gc.disable()
    for module in modules:
        importlib.import_module(module)
    gc.enable()
    gc.freeze()  # the collector would write to every object, and so make a copy of its page in every worker
