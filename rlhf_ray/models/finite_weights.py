"""Weights that are numbers: what is saved, loaded or sent to generators holds no NaN and no infinity."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from rlhf_ray.errors import NotFinite


def first_bad(tensors: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """The name of the first tensor that holds NaN or infinity. One pass over all of them, much cheaper than writing them."""
    for name, tensor in tensors:
        # A sum of finite weights may overflow where they are large: only then each is looked at.
        if not tensor.is_floating_point() or torch.isfinite(tensor.detach().sum(dtype=torch.float32)):
            continue
        if not torch.isfinite(tensor).all():
            return name
    return None


def refuse_bad(tensors: Iterable[tuple[str, torch.Tensor]], what: str) -> None:
    """Raise NotFinite for the first tensor that holds NaN or infinity. what: whose they are, and what is not done now."""
    name = first_bad(tensors)
    if name is not None:
        raise NotFinite(f"{what}: its tensor {name} holds values that are not finite; {REMEDY}")


REMEDY = "lower the stage's learning_rate, or set its precision to float32"
