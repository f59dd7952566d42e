"""What DeepSpeed holds of a training goes when the training ends: weights, gradients, moments, buffers."""

from __future__ import annotations

import functools
from types import FunctionType
from typing import Any

_CACHED = type(functools.lru_cache(lambda: None))


def release_engine(engine: Any) -> None:
    """Let a DeepSpeed engine, which is not used again, go with whoever has it or its module.

    Hooks on gradients are held by autograd, where Python's collector of cycles does not look: through them whoever still had the
    module would have the engine, too, and with it the moments. And one of ZeRO-3's methods has a cache (`functools.lru_cache`,
    within another decorator) that keeps the objects it was called on for ever.
    """
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    engine.destroy()
    for method in vars(PartitionedParameterCoordinator).values():
        cells = (method.__closure__ or ()) if isinstance(method, FunctionType) else ()
        for inner in (cell.cell_contents for cell in cells):
            if type(inner) is _CACHED:
                inner.cache_clear()
