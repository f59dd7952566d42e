"""Ranks that stop together where a loss or a weight is not finite."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import nn

from rlhf_ray.errors import NotFinite
from rlhf_ray.models.finite_weights import REMEDY, first_bad
from rlhf_ray.training.agreement import most_over_ranks


def check_losses(losses: Sequence[torch.Tensor], device: torch.device) -> None:
    """NotFinite on every rank where a loss of any rank is NaN or infinite. Collective."""
    each = torch.stack([loss.detach().float() for loss in losses])
    bad = each[~torch.isfinite(each)]
    if most_over_ranks(len(bad), device) > 0:
        raise NotFinite(f"the loss is {float(bad[0])}" if len(bad) else "the loss of another rank is not finite")


def check_weights(module: nn.Module, what: str, *, sharded: bool, device: torch.device) -> None:
    """NotFinite on every rank where a trained weight of any rank is NaN or infinite. Collective.

    sharded: under ZeRO-3 each rank looks at its own slices, and nothing is gathered.
    what: as in `models.finite_weights.refuse_bad`.
    """
    name = first_bad(_own_values(module, sharded))
    if most_over_ranks(int(name is not None), device) > 0:
        where = "a weight of another rank" if name is None else f"the weight {name}"
        raise NotFinite(f"{what}: {where} holds values that are not finite; {REMEDY}")


def _own_values(module: nn.Module, sharded: bool) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            yield name, _own_slice(parameter) if sharded else parameter.detach()


def _own_slice(parameter: nn.Parameter) -> torch.Tensor:
    """What this rank holds of a parameter under ZeRO-3. Slices are equally long; what the last ones have past the parameter's
    end is memory that DeepSpeed never writes (partition_parameters.py, `torch.empty(partition_size)`): it may hold anything."""
    sharded = cast(Any, parameter)  # DeepSpeed adds ds_tensor, the slice, and ds_numel, the size of the whole
    start = torch.distributed.get_rank() * sharded.ds_tensor.numel()
    return sharded.ds_tensor.detach()[: max(0, sharded.ds_numel - start)]
