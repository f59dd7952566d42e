"""Does a series stay flat? A straight line through it, and how sure its slope is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

#: 97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
           2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101)  # fmt: skip
BLOCKS = len(STUDENT) + 2


@dataclass(frozen=True, slots=True)
class Slope:
    """By least squares, with its 95 % interval."""

    mean: float
    low: float
    high: float


def slope(places: Sequence[float], values: Sequence[float]) -> Slope:
    """Of values over places; at least three of them.

    Long series become the means of BLOCKS blocks first: what a process holds at one step it mostly holds at the next, and
    an interval that took neighbours for independent would be too narrow.
    """
    blocks = min(BLOCKS, len(values))
    assert blocks >= 3, f"{len(values)} values say nothing about a slope"
    x, y = (np.array([part.mean() for part in np.array_split(np.asarray(series, float), blocks)])
            for series in (places, values))  # fmt: skip
    x, y = x - x.mean(), y - y.mean()
    squares = float((x**2).sum())
    mean = float((x * y).sum()) / squares
    left = float(((y - mean * x) ** 2).sum())
    half = STUDENT[blocks - 3] * math.sqrt(left / (blocks - 2) / squares)
    return Slope(mean, mean - half, mean + half)
