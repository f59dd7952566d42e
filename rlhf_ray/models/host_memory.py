"""Memory of the host that a GPU copies to and from, and that other processes of this machine read where it is."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

ALIGNED = 64  # bytes


def pin(buffer: torch.Tensor) -> torch.Tensor:
    """A GPU reads and writes it by itself from now on: for what is used again and again. As large as it is; torch's own pinned
    memory comes in powers of two. To be unpinned before it goes, unless the process goes with it."""
    if buffer.numel():
        torch.cuda.check_error(_runtime().cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0))
    return buffer


def unpin(buffer: torch.Tensor) -> None:
    if buffer.numel():
        torch.cuda.check_error(_runtime().cudaHostUnregister(buffer.data_ptr()))


def _runtime() -> Any:
    return torch.cuda.cudart()  # annotated as None where torch was built without CUDA


def host_buffer(shape: Sequence[int], dtype: torch.dtype, *, pinned: bool) -> torch.Tensor:
    """Not filled."""
    buffer = torch.empty(tuple(shape), dtype=dtype)
    return pin(buffer) if pinned else buffer


@dataclass(frozen=True, slots=True)
class HostWeights:
    """Named tensors in one piece of memory of a process, for others of the same machine and user: only this travels."""

    process: int
    file: int  # its descriptor of the memory
    size: int
    tensors: tuple[tuple[str, torch.dtype, int, tuple[int, ...]], ...]  # name, dtype, first byte, shape

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        memory = _mapped(self.process, self.file, self.size)
        for name, dtype, first, shape in self.tensors:
            yield name, _tensor(memory, dtype, first, shape)


class HostCopy:
    """A model's weights moved into one piece of the host's memory, which has no name in a file system."""

    def __init__(self, model: nn.Module, *, pinned: bool):
        """All weights become parts of it, those that share memory (tied ones) once."""
        own = list({id(each): each for each in (*model.parameters(), *model.buffers())}.values())
        firsts, size = [], 0
        for each in own:
            firsts.append(size)
            size += -(-each.nbytes // ALIGNED) * ALIGNED
        self.file, self.size = os.memfd_create("rlhf_ray weights"), max(size, ALIGNED)
        os.ftruncate(self.file, self.size)
        self.memory = _mapped(os.getpid(), self.file, self.size)
        self.pinned = pin(torch.empty(0, dtype=torch.uint8).set_(self.memory)) if pinned else None
        with torch.no_grad():
            for each, first in zip(own, firsts, strict=True):
                each.data = _tensor(self.memory, each.dtype, first, tuple(each.shape)).copy_(each.data)

    def close(self) -> None:
        """Before the weights go elsewhere."""
        os.close(self.file)
        if self.pinned is not None:
            unpin(self.pinned)

    def named(self, weights: Iterable[tuple[str, torch.Tensor]]) -> HostWeights:
        """weights: of the model."""
        first = self.memory.data_ptr()
        tensors = [(name, each.dtype, each.data_ptr() - first, tuple(each.shape)) for name, each in weights]
        assert all(0 <= place < self.size for _, _, place, _ in tensors), "these weights lie elsewhere"
        return HostWeights(os.getpid(), self.file, self.size, tuple(tensors))


def _mapped(process: int, file: int, size: int) -> torch.UntypedStorage:
    return cast(torch.UntypedStorage, torch.UntypedStorage.from_file(f"/proc/{process}/fd/{file}", True, size))


def _tensor(memory: torch.UntypedStorage, dtype: torch.dtype, first: int, shape: tuple[int, ...]) -> torch.Tensor:
    strides = torch.empty(shape, device="meta").stride()
    return torch.empty(0, dtype=dtype).set_(memory, first // dtype.itemsize, shape, strides)
