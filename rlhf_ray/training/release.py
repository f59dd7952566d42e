"""What DeepSpeed holds of a training goes when the training ends: weights, gradients, moments, buffers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


def release_engine(engine: Any) -> None:
    """Let a DeepSpeed engine, which is not used again, go with whoever has it or its module.

    Hooks on gradients are held by autograd, where Python's collector of cycles does not look: through them whoever still had the
    module would have the engine, too, and with it the moments. ZeRO-3 keeps its objects in caches of its own besides, so the memory
    of its shares is given back here, whoever refers to them.
    """
    engine.destroy()
    if engine.zero_optimization_stage() == 3:
        for tensor in _shares(engine):
            tensor.untyped_storage().resize_(0)


def _shares(engine: Any) -> Iterator[torch.Tensor]:
    """This rank's weights, as they are gathered and as they are stepped, moments and gradients."""
    optimizer = engine.optimizer  # DeepSpeed's wrapper, which has no annotations
    yield from (parameter.ds_tensor for parameter in engine.module.parameters())
    yield from optimizer.fp32_partitioned_groups_flat
    yield from (each for state in optimizer.optimizer.state.values() for each in state.values() if isinstance(each, torch.Tensor))
    yield optimizer.grad_partitions_flat_buffer
