"""How far a supervised stage is, and the learning rate that follows from it, as a share of its peak."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal


def progress_of(*, step: float, total_steps: int, elapsed_s: float, limit_s: float | None) -> float:
    """The progress of a stage, 0 to 1: by steps or by time, whichever is further.

    A stage with a time limit thus ends at a small learning rate whether its steps or its time run out first.
    """
    by_time = elapsed_s / limit_s if limit_s is not None else 0.0
    return min(max(step / total_steps, by_time), 1.0)


def outlook(row: Mapping[str, Any], max_minutes: float | None) -> dict[str, Any]:
    """What is to come after a line of metrics: the last step (an estimate where the time limit will come before it) and the
    time to the limit; or that the training is over."""
    if row["progress"] >= 1:
        return {"total": row["step"], "doing": "trained; saves and measures the model"}
    total = max(round(row["step"] / row["progress"]), row["step"])
    left = {} if max_minutes is None else {"limit_s": 60 * max_minutes - row["elapsed_s"]}
    return {"total": total, "total_is_estimate": total < row["total_steps"], **left}


def rate_factor(progress: float, *, schedule: Literal["linear", "cosine", "constant"], warmup_ratio: float) -> float:
    """Rises linearly to 1 over the first `warmup_ratio`, then falls to 0 at the end (or stays: "constant")."""
    if progress < warmup_ratio:
        return progress / warmup_ratio
    if schedule == "constant":
        return 1.0
    left = (1 - progress) / (1 - warmup_ratio)
    return left if schedule == "linear" else 0.5 * (1 - math.cos(math.pi * left))
