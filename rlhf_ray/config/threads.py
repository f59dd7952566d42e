"""How many threads each process computes with, where the recipe leaves it open.

Settled once for a run, since the bits of a gradient depend on it.
"""

from __future__ import annotations

from collections.abc import Mapping

from rlhf_ray.config import Recipe, Section

# Read by libgomp when torch is loaded. Generation is thousands of operations, too short for threads to sleep in between: with
# 0.2 ms of spin wait a decode step of a few rows takes a half to an eighth of the time (rlhf_ray/bench/trials.py spinning).
# Only for processes that have their cores to themselves then: others would take the cores from each other.
ALONE_ENVIRONMENT = {"GOMP_SPINCOUNT": "20000"}


def settle_threads(recipe: Recipe, recorded: Recipe | None, *, cores: int, nodes: int = 1) -> Recipe:
    """The recipe with a number for every `threads`: its own, else what the run folder has recorded, else a share of the cores.

    cores: of the smallest node that has any; nodes: how many of them there are.
    """
    stages, share = stage_shares(recipe, cores, nodes), role_shares(recipe, cores, nodes)
    sections: dict[str, Section] = {}
    for name, section in recipe.trained.items():
        if section.threads is None:
            before = recorded.trained.get(name) if recorded is not None else None
            sections[name] = section.model_copy(update={"threads": (before and before.threads) or stages[name]})
    roles: dict[str, Section] = {}
    for name, role in recipe.ppo_roles.items():
        if role.threads is None:
            before = recorded.resources.roles[name].threads if recorded is not None else None
            roles[name] = role.model_copy(update={"threads": before or share[name]})
    return recipe.model_copy(update=sections | {"resources": recipe.resources.model_copy(update=roles)})


def stage_shares(recipe: Recipe, cores: int, nodes: int = 1) -> Mapping[str, int]:
    """Threads of each worker of a supervised stage: its workers fill a node."""
    return {name: _each(section.workers, cores, nodes) for name, section in recipe.trained.items()}


def role_shares(recipe: Recipe, cores: int, nodes: int = 1) -> Mapping[str, int]:
    """Threads of each PPO actor, so that those that work at the same time fill a node and no more.

    Generators have their node to themselves. Policy and critic train side by side, as reward model and reference score.
    """
    beside = {"generation": 1, "policy": 2 if recipe.ppo.has_critic else 1}
    return {name: _each(role.actors * beside.get(name, 2), cores, nodes) for name, role in recipe.ppo_roles.items()}


def _each(processes: int, cores: int, nodes: int) -> int:
    return max(1, cores // -(-processes // nodes))
