"""What DeepSpeed holds of a training goes when the training ends: weights, gradients, moments, buffers."""

from __future__ import annotations

import functools
import gc
from typing import Any

#: Of ZeRO-3: one of its methods has a cache that keeps the objects it was called on for ever.
KEEPS = "deepspeed.runtime.zero.partitioned_param_coordinator"
_CACHED = type(functools.lru_cache(lambda: None))


def release_engine(engine: Any) -> None:
    """Let a DeepSpeed engine, which is not used again, go with whoever has it or its module.

    Hooks on gradients are held by autograd, where Python's collector of cycles does not look: through them whoever still had the
    module would have the engine, too, and with it the moments.
    """
    engine.destroy()
    for each in gc.get_objects():  # the cache itself is within two decorators
        if type(each) is _CACHED and each.__module__ == KEEPS:
            each.cache_clear()
