"""Response tokens as rows with padding on the right.   B rollouts, T tokens of the longest response."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def action_mask(response_lengths: torch.Tensor) -> torch.Tensor:
    """[B, T] bool, True on the response's tokens, T the longest response."""
    return torch.arange(int(response_lengths.max()), device=response_lengths.device) < response_lengths[:, None]


def pad_tokens(rows: Sequence[np.ndarray], device: torch.device | str = "cpu") -> torch.Tensor:
    """Rows of floats, one per response token, as [B, T] with zeros on the right."""
    padded = np.zeros((len(rows), max(map(len, rows))), np.float32)
    for out, row in zip(padded, rows, strict=True):
        out[: len(row)] = row
    return torch.from_numpy(padded).to(device)
