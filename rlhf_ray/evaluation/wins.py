"""How often one model's responses score higher than another's, as they are and at equal length.   P prompts, S seeds, R resamples.

Judges prefer long answers. Dubois et al. (arXiv 2404.04475) fit the wins by a logistic regression on the difference of the two
lengths and read it where that is 0. Theirs has a term for each prompt's difficulty too, which takes many models; here are two.
"""

from __future__ import annotations

import numpy as np

from rlhf_ray.evaluation.estimates import Estimate, Resampler, win_rate
from rlhf_ray.evaluation.evidence import Evidence

STEPS = 50  # Newton's; a handful, where the wins don't follow from the length alone
FARTHEST = 30.0  # of the log-odds: where all are won the best intercept is infinite
RIDGE = 1e-3  # on the slope, where the length decides all


def wins_over(ours: Evidence, theirs: Evidence) -> dict:
    """Win rates under each scorer, and those "at_equal_length"; null for a scorer that is not there."""
    pairs = {
        "reward_model": [None if each.scores is None else each.scores.total for each in (ours, theirs)],
        "judge": [ours.judge, theirs.judge],
    }
    length, other_length = (ours.table(each.responses.lengths) for each in (ours, theirs))
    raw: dict[str, dict | None] = dict.fromkeys(pairs)
    level: dict[str, dict | None] = dict.fromkeys(pairs)
    for key, (one, other) in pairs.items():
        if one is not None and other is not None:
            raw[key] = ours.mean(win_rate(one, other)).figure()
            found = win_rate_at_equal_length(ours.table(one), ours.table(other), length, other_length, ours.resampler)
            level[key] = None if found is None else found.figure()
    return {**raw, "at_equal_length": level}


def win_rate_at_equal_length(
    ours: np.ndarray, theirs: np.ndarray, lengths: np.ndarray, other_lengths: np.ndarray, resampler: Resampler
) -> Estimate | None:
    """Scores and lengths [P, S] each. None where no pair differs in length."""
    apart = (np.asarray(lengths, float) - other_lengths).ravel()
    spread = apart.std()
    if not np.any(apart) or spread == 0:
        return None
    apart, wins = np.tanh(apart / spread), win_rate(ours, theirs).ravel()
    seeds = len(wins) // resampler.prompts
    weights = np.repeat(resampler.weights, seeds, axis=1)  # [R, P * S]
    point = _intercepts(np.ones((1, len(wins))), apart, wins)
    return Estimate(float(_share(point)[0]), _share(_intercepts(weights, apart, wins)))


def _share(log_odds: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-log_odds))


def _intercepts(weights: np.ndarray, apart: np.ndarray, wins: np.ndarray) -> np.ndarray:
    """Of a logistic regression for each row of weights [R, N], by Newton's steps; wins may be 0.5.   -> [R]"""
    intercept = slope = np.zeros(len(weights))
    for _ in range(STEPS):
        share = _share(np.clip(intercept[:, None] + slope[:, None] * apart, -FARTHEST, FARTHEST))
        error = weights * (wins - share)
        curve = weights * np.maximum(share * (1 - share), 1e-9)
        by_one, by_slope = error.sum(1), error @ apart - RIDGE * slope
        one, cross, square = curve.sum(1), curve @ apart, curve @ apart**2 + RIDGE
        below = one * square - cross**2
        moves = (square * by_one - cross * by_slope) / below, (one * by_slope - cross * by_one) / below
        intercept = np.clip(intercept + np.clip(moves[0], -2, 2), -FARTHEST, FARTHEST)
        slope = np.clip(slope + np.clip(moves[1], -2, 2), -FARTHEST, FARTHEST)
        if max(np.abs(move).max() for move in moves) < 1e-10:
            break
    return intercept
