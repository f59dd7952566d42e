"""Model weights between processes: numpy arrays, which the object store passes on uncopied, or handles of GPU memory."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Set

import numpy as np
import torch
from torch import nn

from rlhf_ray.errors import UserError
from rlhf_ray.models.shared_gpu import SharedTensor

Weight = torch.Tensor | np.ndarray | SharedTensor


class WeightsInTurn(Mapping[str, Weight]):
    """Weights that are still coming: names and shapes are known, and each weight is read once, in their order."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], weights: Iterable[tuple[str, Weight]]):
        self.shapes, self._weights = shapes, iter(weights)

    def __getitem__(self, name: str) -> Weight:
        if name not in self.shapes:
            raise KeyError(name)
        came, weight = next(self._weights)
        assert came == name, f"{came} comes next, not {name}: weights that are still coming are read in their order"
        return weight

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __contains__(self, name: object) -> bool:
        return name in self.shapes  # without reading it


def pack_weights(
    weights: Iterable[tuple[str, torch.Tensor]], parts: int, dtype: torch.dtype, *, keep: bool = True, copy: bool = True
) -> list[dict[str, np.ndarray]]:
    """`parts` dicts of about equal size. bfloat16 travels as its bits in int16, which numpy has.

    keep=False iterates (other ranks gather with us) and returns empty dicts. copy=False: where dtype and device are those of
    the weights already, arrays are the live weights, for a caller that is done with them before training goes on.
    """
    arrays = {name: _to_array(tensor, dtype, copy) for name, tensor in weights if keep}
    packed: list[dict[str, np.ndarray]] = [{} for _ in range(parts)]
    share = max(sum(array.nbytes for array in arrays.values()) / parts, 1)
    filled = 0
    for name, array in arrays.items():
        packed[min(int(filled / share), parts - 1)][name] = array
        filled += array.nbytes
    return packed


def as_tensor(weight: Weight) -> torch.Tensor:
    """A weight as it comes off the wire; it may be read-only."""
    if isinstance(weight, torch.Tensor):
        return weight
    if isinstance(weight, SharedTensor):
        return weight.open()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "not writable": it is only read from, here
        tensor = torch.from_numpy(weight)
    return tensor.view(torch.bfloat16) if weight.dtype == np.int16 else tensor


def load_named(model: nn.Module, weights: Mapping[str, torch.Tensor], kept: Set[str] = frozenset()) -> None:
    """Copy weights into a model by name; a tied weight comes under one of its names. Only `kept` may be missing."""
    missing, unexpected = model.load_state_dict(weights, strict=False)
    own = dict(model.named_parameters())
    absent = [name for name in missing if name in own and name not in kept]
    if absent or unexpected:
        raise UserError(f"weights do not fit the model: missing {absent[:3]}, unknown {unexpected[:3]}; they are of another model")


@torch.no_grad()
def copy_weights(model: nn.Module, state: Mapping[str, Weight], kept: Set[str] = frozenset()) -> None:
    """Copy weights as they come off the wire into a model, in place.

    Every weight must be there under its name in state_dict (tied weights: under one of their names) and with its shape,
    except those in `kept`, which stay. All is checked before anything is copied. Values take the model's dtype. An
    int16 array is the bits of bfloat16, which numpy doesn't have. Of weights in turn there is one at a time.
    """
    targets = model.state_dict()
    shapes = state.shapes if isinstance(state, WeightsInTurn) else {name: tuple(given.shape) for name, given in state.items()}
    names_of: dict[tuple, list[str]] = {}
    for name, target in targets.items():
        storage = (target.data_ptr(), target.shape, target.stride())
        names_of.setdefault(storage if target.numel() else (name,), []).append(name)
    known = shapes.keys() | kept
    missing = [names[0] for names in names_of.values() if known.isdisjoint(names)]
    if missing or not shapes.keys() <= targets.keys():
        unknown = sorted(shapes.keys() - targets.keys())
        raise ValueError(f"weights do not fit the model: missing {missing[:5]}, unknown {unknown[:5]}")
    for name, given_shape in shapes.items():
        shape = tuple(targets[name].shape)
        if given_shape != shape:
            raise ValueError(f"weight {name} has shape {given_shape}, the model's has {shape}")
    for name, given in state.items():
        targets[name].copy_(as_tensor(given))


def _to_array(tensor: torch.Tensor, dtype: torch.dtype, copy: bool) -> np.ndarray:
    # At most one copy: the tensor may be the live parameter, which the next update overwrites.
    there = to_host(tensor.detach(), dtype, copy=copy).contiguous()
    return (there.view(torch.int16) if dtype == torch.bfloat16 else there).numpy()


def to_host(tensor: torch.Tensor, dtype: torch.dtype, *, copy: bool) -> torch.Tensor:
    """The tensor in `dtype` on the host. copy: even where it is that already.

    A GPU casts before it sends: torch would send all digits, to cast them here. Pinned memory takes them without a copy between.
    """
    if tensor.device.type == "cpu":
        return tensor.to(dtype=dtype, copy=copy)
    cast = tensor.to(dtype)
    return torch.empty(cast.shape, dtype=dtype, pin_memory=torch.cuda.is_available()).copy_(cast)
