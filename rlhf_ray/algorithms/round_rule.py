"""When a policy counts as better than the one before: a rule about people, of whom only a scorer is asked.

A scorer says that the new policy's answer is better in a share w of pairs, and people agree with it in a share q of pairs. If they
agree as often on these pairs, whatever it says, people prefer the new answer in a share of

    p = q w + (1 - q) (1 - w) = 1/2 + (2 q - 1) (w - 1/2)

This is the cautious reading. If it is the scorer that errs as often, whatever people prefer, then w = 1/2 + (2 q - 1) (p - 1/2),
and p is farther from 1/2, on the same side. No formula helps where people agree less with it on the new pairs than on those that q
was measured on, as they do where the policy was trained against this scorer.

Both shares have 95 % intervals, and p's is from the smallest to the largest value in their box. A policy that is no better is taken
for better only where one of the two intervals lies wholly above its truth: at most 2.5 % each, 5 % together.
"""

from __future__ import annotations

from itertools import product

from rlhf_ray.algorithms.intervals import Interval


def expected_share(win_rate: Interval, accuracy: Interval) -> Interval:
    """The share of pairs in which people are expected to prefer the new policy's answer.

    A scorer that is right less often than chance counts as chance: it is not to be trusted the other way round.
    """

    def share(won: float, right: float) -> float:
        return 0.5 + (2 * max(right, 0.5) - 1) * (won - 0.5)

    ends = ("low", "high")
    corners = [share(win_rate[one], accuracy[other]) for one, other in product(ends, ends)]
    return {"mean": share(win_rate["mean"], accuracy["mean"]), "low": min(corners), "high": max(corners)}


def is_better(expected: Interval, margin: float) -> bool:
    """Whether people prefer it in more than half of the pairs, by more than the margin, as far as the interval says."""
    return expected["low"] > 0.5 + margin
