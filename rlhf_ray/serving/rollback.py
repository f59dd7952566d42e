"""When a new version is rolled back: it fails more, is slower, or the judge likes its answers less than the old one's.

Both are measured on their last answers. `Thresholds` says in words what is too much. No Ray, no HTTP.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median, variance

WINDOW = 500  # last answers of a version that count


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """The new version is rolled back if ..."""

    failures: int = 3
    """... at least this many of its answers failed (status 5xx, or cut off), and"""
    failed_share: float = 0.05
    """the share of its answers that failed is higher than the old version's by more than this;"""
    slower: float = 2.0
    """... its median time per token is more than this many times the old version's;"""
    worse: float = 3.0
    """... the judge's mean score of its answers lies below the old version's by more than this many standard errors of the
    difference."""
    least: int = 30
    """Time and score count from this many answers of both versions on."""


class Record:
    """What was seen of one version's answers."""

    def __init__(self) -> None:
        self._failed: deque[bool] = deque(maxlen=WINDOW)
        self.seconds_per_token: deque[float] = deque(maxlen=WINDOW)
        self.scores: deque[float] = deque(maxlen=WINDOW)

    def answered(self, *, failed: bool, seconds: float, tokens: int) -> None:
        """seconds: of the whole answer; tokens: that were written."""
        self._failed.append(failed)
        if tokens and not failed:
            self.seconds_per_token.append(seconds / tokens)

    def scored(self, score: float) -> None:
        self.scores.append(score)

    @property
    def answers(self) -> int:
        return len(self._failed)

    @property
    def failures(self) -> int:
        return sum(self._failed)

    @property
    def failed_share(self) -> float:
        return self.failures / max(1, self.answers)

    def summary(self) -> dict[str, float | int | None]:
        return {
            "answers": self.answers,
            "failed": self.failures,
            "ms_per_token": 1000 * median(self.seconds_per_token) if self.seconds_per_token else None,
            "score": fmean(self.scores) if self.scores else None,
            "scored": len(self.scores),
        }


def reason_to_roll_back(new: Record, old: Record, limits: Thresholds) -> str | None:
    """A sentence that says what is worse; None while nothing is, or too little is known."""
    if new.failures >= limits.failures and new.failed_share > old.failed_share + limits.failed_share:
        return (
            f"{new.failures} of its {new.answers} answers failed ({new.failed_share:.0%}), of the old version's "
            f"{old.failed_share:.0%}; at most {limits.failed_share:.0%} more are allowed"
        )
    if min(len(new.seconds_per_token), len(old.seconds_per_token)) >= limits.least:
        own, before = median(new.seconds_per_token), median(old.seconds_per_token)
        if own > limits.slower * before:
            return (
                f"it takes {1000 * own:.3g} ms per token, the old version {1000 * before:.3g} ms; at most "
                f"{limits.slower:g} times that is allowed"
            )
    if min(len(new.scores), len(old.scores)) >= limits.least:
        fall, error = fmean(old.scores) - fmean(new.scores), _error_of_difference(new.scores, old.scores)
        if fall > limits.worse * error:
            return (
                f"the judge's mean score of its answers is {fmean(new.scores):.3g}, of the old version's {fmean(old.scores):.3g}: "
                f"lower by more than {limits.worse:g} standard errors ({error:.2g})"
            )
    return None


def _error_of_difference(one: Sequence[float], other: Sequence[float]) -> float:
    """Of two means, by Welch."""
    return (variance(one) / len(one) + variance(other) / len(other)) ** 0.5
