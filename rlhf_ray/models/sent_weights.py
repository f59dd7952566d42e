"""What new weights take on their way from the policy to the generators, by the way that the recipe's resources allow.   Bytes.

The way itself is chosen when the actors stand (`actors.weight_transport`); this is what the plan expects.
"""

from __future__ import annotations

from typing import Literal

from rlhf_ray.config import Recipe

HELD_IN_FLIGHT = 2  # versions in a generator's memory: one that is copied in, and a newer one that came meanwhile


def planned_way(recipe: Recipe) -> Literal["object_store", "collective", "ipc"]:
    resources = recipe.resources
    if resources.weight_transport != "auto":
        return resources.weight_transport
    if not (resources.policy.gpus > 0 and resources.generation.gpus > 0):
        return "object_store"
    if resources.generation.gpus >= 1:  # the policy's first rank is on another
        return "collective"
    return "ipc" if recipe.ppo.steps_ahead == 0 else "object_store"


def sends_by_store(recipe: Recipe) -> bool:
    """Whether new weights go through the object store, not from GPU to GPU."""
    return planned_way(recipe) == "object_store"


def versions_in_store(recipe: Recipe) -> int:
    """Of the weights, in the object store at a time: one that is put, those that nobody has waited for yet, one that is read."""
    ahead = 0 if recipe.ppo.weights_in_flight else recipe.ppo.steps_ahead
    return 2 + max(ahead, 1)


def staged_bytes(recipe: Recipe, trained: int, itemsize: int) -> float:
    """In the host's memory of the policy's first rank, all the time: the copy that is sent while training goes on."""
    stages = planned_way(recipe) == "collective" and recipe.ppo.steps_ahead > 0
    return float(itemsize) * trained if stages else 0.0


def shared_bytes(recipe: Recipe, trained: int, itemsize: int) -> float:
    """On the GPU of the policy's first rank, all the time: the copy that generators on it read."""
    return float(itemsize) * trained if planned_way(recipe) == "ipc" else 0.0


def received_bytes(recipe: Recipe, trained: int, itemsize: int) -> float:
    """In a generator's host memory, where weights arrive while it draws."""
    receives = planned_way(recipe) == "collective" and recipe.ppo.weights_in_flight
    return float(HELD_IN_FLIGHT * itemsize) * trained if receives else 0.0
