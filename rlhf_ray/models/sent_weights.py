"""What new weights take on their way from the policy to the generators.   Bytes.

The way is chosen by where the actors stand (`actors.weight_transport.choose_transport`), in a plan as in a run.
"""

from __future__ import annotations

from typing import Literal

from rlhf_ray.config import Recipe

Transport = Literal["object_store", "collective", "ipc"]
HELD_IN_FLIGHT = 2  # versions in a generator's memory: one that is copied in, and a newer one that came meanwhile


def versions_in_store(recipe: Recipe) -> int:
    """Of the weights, in the object store at a time: one that is put, those that nobody has waited for yet, one that is read."""
    ahead = 0 if recipe.ppo.weights_in_flight else recipe.ppo.steps_ahead
    return 2 + max(ahead, 1)


def staged_bytes(recipe: Recipe, way: Transport, trained: int, itemsize: int) -> float:
    """In the host's memory of the policy's first rank, all the time: the copy that is sent while training goes on."""
    return float(itemsize) * trained if way == "collective" and recipe.ppo.steps_ahead > 0 else 0.0


def shared_bytes(way: Transport, trained: int, itemsize: int) -> float:
    """On the GPU of the policy's first rank, all the time: the copy that generators on it read."""
    return float(itemsize) * trained if way == "ipc" else 0.0


def received_bytes(recipe: Recipe, way: Transport, trained: int, itemsize: int) -> float:
    """In a generator's host memory, where weights arrive while it draws."""
    receives = way == "collective" and recipe.ppo.weights_in_flight
    return float(HELD_IN_FLIGHT * itemsize) * trained if receives else 0.0
