"""95 % intervals of shares and correlations in closed form: right for few rows too, where a bootstrap finds no spread.   N rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypedDict

Z = 1.959964  # 95 % of a normal distribution lie within this many deviations


class Interval(TypedDict):
    """A figure as summary.json holds it."""

    mean: float
    low: float
    high: float


def wilson(share: float, trials: float) -> tuple[float, float]:
    """Wilson's score interval (1927) of a share in `trials` independent trials. Of 3 right in 3: 0.44 to 1."""
    weight = Z**2 / trials
    middle = (share + weight / 2) / (1 + weight)
    half = Z / (1 + weight) * math.sqrt(share * (1 - share) / trials + weight / (4 * trials))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def independent_trials(right: Sequence[float], groups: Sequence[int]) -> float:
    """How many independent trials leave a share as uncertain as `right` [N] (0 to 1), where rows of a group [N] go together.

    Kish's effective sample size, by the variance of the groups' sums (Korn and Graubard 1998): pairs of one prompt share
    its replies, and six of them say less than six pairs of six prompts.
    """
    rows, share = len(right), sum(right) / len(right)
    sums: dict[int, float] = {}
    for value, group in zip(right, groups, strict=True):
        sums[group] = sums.get(group, 0.0) + value - share
    count = len(sums)
    variance = sum(each**2 for each in sums.values()) / rows**2 * (count / (count - 1) if count > 1 else 1.0)
    if variance < 1e-12:  # all alike, or a single group
        return float(count)
    return min(max(share * (1 - share) / variance, 1.0), float(rows))


def share_interval(right: Sequence[float], groups: Sequence[int] | None = None, trials: float = math.inf) -> Interval:
    """The mean of `right` [N] (1 right, 0 wrong, 0.5 a tie) with its interval.

    groups: which rows go together; None: each stands alone. trials: no more than this many count as independent
    """
    own = float(len(right)) if groups is None else independent_trials(right, groups)
    share = sum(right) / len(right)
    low, high = wilson(share, max(min(own, trials), 1.0))
    return {"mean": share, "low": low, "high": high}


def correlation_interval(value: float, rows: int) -> Interval | None:
    """Fisher's interval (1921) of a correlation over `rows` rows. None: not a number. Three rows or fewer say nothing."""
    if not math.isfinite(value):
        return None
    if rows <= 3:
        return {"mean": value, "low": -1.0, "high": 1.0}
    middle, half = math.atanh(min(max(value, -1 + 1e-12), 1 - 1e-12)), Z / math.sqrt(rows - 3)
    return {"mean": value, "low": math.tanh(middle - half), "high": math.tanh(middle + half)}
