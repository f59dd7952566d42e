"""A tensor of one process, opened by another on the same GPU (CUDA IPC): a handle travels, not the numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

DEVICE_ARGUMENT = 6  # of torch.multiprocessing.reductions.rebuild_cuda_tensor


@dataclass(frozen=True, slots=True)
class SharedTensor:
    """Valid as long as the process that made it keeps the tensor, which it must not change meanwhile."""

    shape: tuple[int, ...]
    gpu: str
    rebuild: tuple[Any, tuple]  # a function of torch's and its arguments, as torch.multiprocessing sends them

    @classmethod
    def of(cls, tensor: torch.Tensor) -> SharedTensor:
        from torch.multiprocessing.reductions import reduce_tensor

        return cls(tuple(tensor.shape), gpu_id(tensor.device), reduce_tensor(tensor))

    def open(self) -> torch.Tensor:
        """The same memory in this process, which may number the GPU differently."""
        device = torch.cuda.current_device()
        assert gpu_id(device) == self.gpu, f"shared on GPU {self.gpu}, opened on {gpu_id(device)}"
        function, arguments = self.rebuild
        return function(*arguments[:DEVICE_ARGUMENT], device, *arguments[DEVICE_ARGUMENT + 1 :])


def gpu_id(device: torch.device | int) -> str:
    """A GPU's UUID: the same in every process, whatever number CUDA_VISIBLE_DEVICES gives the GPU."""
    return str(torch.cuda.get_device_properties(device).uuid)


def share_weights(weights, dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], dict[str, SharedTensor]]:
    """Copies of (name, tensor) pairs in `dtype`, which the caller keeps while others read, and their handles."""
    kept = {name: tensor.detach().to(dtype, copy=True).contiguous() for name, tensor in weights}
    torch.cuda.synchronize()
    return kept, {name: SharedTensor.of(tensor) for name, tensor in kept.items()}
