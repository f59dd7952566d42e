"""Numbers that are numbers: a NaN is named where it appears, before it can spread over a batch.   B rollouts, T tokens."""

from __future__ import annotations

import torch


class BadNumber(ValueError):
    """Something is NaN or infinite. `row` of the batch has it first."""

    def __init__(self, what: str, row: int):
        super().__init__(what, row)
        self.what, self.row = what, row

    def __str__(self) -> str:
        return self.what


def check_finite(what: str, values: torch.Tensor, action_mask: torch.Tensor | None = None) -> None:
    """BadNumber unless all values [B] or [B, T] are finite; of [B, T] those where action_mask is True count."""
    bad = ~torch.isfinite(values)
    if action_mask is not None:
        bad = bad & action_mask
    if bool(bad.any()):
        row = int(bad.reshape(len(bad), -1).any(1).nonzero()[0])
        value = float(values[row][bad[row]].reshape(-1)[0])
        raise BadNumber(f"{what} is {value}", row)
