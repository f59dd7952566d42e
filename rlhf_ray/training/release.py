"""What DeepSpeed holds of a training goes when the training ends: weights, gradients, moments, buffers."""

from __future__ import annotations

from typing import Any

#: A method of ZeRO-3's that keeps the objects it was called on for ever (`functools.lru_cache`).
KEEPS = "_PartitionedParameterCoordinator__params_to_release"


def release_engine(engine: Any) -> None:
    """Let a DeepSpeed engine, which is not used again, go with whoever has it or its module.

    Hooks on gradients are held by autograd, where Python's collector of cycles does not look: through them whoever still had the
    module would have the engine, too, and with it the moments.
    """
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    engine.destroy()
    vars(PartitionedParameterCoordinator)[KEEPS].cache_clear()
