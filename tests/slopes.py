"""Whether a measured quantity grows: its slope over time, with an interval that holds for residuals that hang together.

Newey and West (1987, Econometrica 55, 703): ordinary least squares with a covariance that counts what residuals up to `lag` samples
apart have in common, weighted by Bartlett's kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student


@dataclass(frozen=True, slots=True)
class Slope:
    mean: float  # of the values
    per_hour: float
    low: float  # 95 %
    high: float


def slope(hours: np.ndarray, values: np.ndarray, *, lag: int, confidence: float = 0.95) -> Slope:
    """hours, values: [N], in order of time."""
    count = len(values)
    design = np.stack([np.ones(count), hours], axis=1)  # [N, 2]
    inverse = np.linalg.inv(design.T @ design)
    fitted = inverse @ design.T @ values  # intercept, slope
    scores = design * (values - design @ fitted)[:, None]  # [N, 2]
    middle = scores.T @ scores
    for apart in range(1, lag + 1):
        shared = scores[apart:].T @ scores[:-apart]
        middle += (1 - apart / (lag + 1)) * (shared + shared.T)
    covariance = inverse @ middle @ inverse * count / (count - 2)
    half = float(student.ppf((1 + confidence) / 2, count - 2) * np.sqrt(covariance[1, 1]))
    return Slope(float(np.mean(values)), float(fitted[1]), float(fitted[1]) - half, float(fitted[1]) + half)
