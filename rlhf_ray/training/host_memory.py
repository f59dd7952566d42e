"""Memory of the host that a GPU copies to and from."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def host_buffer(shape: Sequence[int], dtype: torch.dtype, *, pinned: bool) -> torch.Tensor:
    """Not filled. pinned: a GPU reads and writes it by itself. As large as it is said: torch's own pinned memory comes in powers
    of two. It stays pinned as long as the process lives, so it is for what is used again and again."""
    buffer = torch.empty(tuple(shape), dtype=dtype)
    if pinned and buffer.numel():
        torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0))
    return buffer
