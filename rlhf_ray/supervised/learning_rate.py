"""The learning rate of a supervised stage, as a share of its peak."""

from __future__ import annotations

import math
from typing import Literal


def progress_of(*, step: float, total_steps: int, elapsed_s: float, limit_s: float | None) -> float:
    """The progress of a stage, 0 to 1: by steps or by time, whichever is further.

    A stage with a time limit thus ends at a small learning rate whether its steps or its time run out first.
    """
    by_time = elapsed_s / limit_s if limit_s is not None else 0.0
    return min(max(step / total_steps, by_time), 1.0)


def rate_factor(progress: float, *, schedule: Literal["linear", "cosine", "constant"], warmup_ratio: float) -> float:
    """Rises linearly to 1 over the first `warmup_ratio`, then falls to 0 at the end (or stays: "constant")."""
    if progress < warmup_ratio:
        return progress / warmup_ratio
    if schedule == "constant":
        return 1.0
    left = (1 - progress) / (1 - warmup_ratio)
    return left if schedule == "linear" else 0.5 * (1 - math.cos(math.pi * left))
