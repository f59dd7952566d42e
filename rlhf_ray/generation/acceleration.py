"""Decode steps as they are: by torch's operations. `cpu`, which the last line imports, makes them faster.
Without that line, and without `cpu`, all else stays.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch

from rlhf_ray.generation.decode_step import DecodeStep


class FastStep(Protocol):
    """What a decoder uses of a decode step (`DecodeStep` says what it does)."""

    # cache: a RaggedCache, of which `cpu` knows only what it reads
    def __call__(self, cache: Any, tokens: np.ndarray, positions: np.ndarray) -> torch.Tensor: ...
    def forget(self) -> None: ...


def accelerate(step: DecodeStep) -> FastStep:
    """A step that computes the same up to rounding, as fast as this machine can."""
    return step


def hindrance() -> str | None:
    """Why steps on this machine are slower than they could be, in words for its user."""
    return None


from rlhf_ray.cpu.cpu_door import accelerate, hindrance  # noqa: E402, F401, F811 - without it all above holds
