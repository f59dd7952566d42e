"""Model weights as numpy arrays, which travel through the object store without a copy."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Set

import numpy as np
import torch
from torch import nn


def pack_weights(
    weights: Iterable[tuple[str, torch.Tensor]], parts: int, dtype: torch.dtype, *, keep: bool = True
) -> list[dict[str, np.ndarray]]:
    """`parts` dicts of about equal size. bfloat16 travels as its bits in int16, which numpy has.

    keep=False iterates (other ranks gather with us) and returns empty dicts.
    """
    arrays = {name: _to_array(tensor.to(dtype)) for name, tensor in weights if keep}
    packed: list[dict[str, np.ndarray]] = [{} for _ in range(parts)]
    share = max(sum(array.nbytes for array in arrays.values()) / parts, 1)
    filled = 0
    for name, array in arrays.items():
        packed[min(int(filled / share), parts - 1)][name] = array
        filled += array.nbytes
    return packed


def as_tensor(weight: torch.Tensor | np.ndarray) -> torch.Tensor:
    """A weight as it comes off the wire; it may be read-only."""
    if isinstance(weight, torch.Tensor):
        return weight
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "not writable": it is only read from, here
        tensor = torch.from_numpy(weight)
    return tensor.view(torch.bfloat16) if weight.dtype == np.int16 else tensor


def load_named(model: nn.Module, weights: Mapping[str, torch.Tensor], kept: Set[str] = frozenset()) -> None:
    """Copy weights into a model by name; a tied weight comes under one of its names. Nothing may be missing but `kept`."""
    missing, unexpected = model.load_state_dict(weights, strict=False)
    own = dict(model.named_parameters())
    absent = [name for name in missing if name in own and name not in kept]
    assert not absent and not unexpected, (absent, unexpected)


def _to_array(tensor: torch.Tensor) -> np.ndarray:
    # A copy: the tensor may be the live parameter, which the next update overwrites.
    tensor = tensor.detach().cpu().contiguous()
    bits = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
    return bits.numpy().copy()
