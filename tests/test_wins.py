"""Win rates at equal length."""

import math

import numpy as np
import pytest

from rlhf_ray.evaluation.estimates import Resampler, win_rate
from rlhf_ray.evaluation.wins import win_rate_at_equal_length


def drawn(prompts, seeds, log_odds, slope, seed=0):
    """Wins that follow a logistic law of the length difference. -> scores, other scores, lengths, other lengths, share won"""
    rng = np.random.default_rng(seed)
    lengths, others = rng.integers(20, 60, (prompts, seeds)), rng.integers(5, 45, (prompts, seeds))
    apart = lengths - others
    odds = log_odds + slope * np.tanh(apart / apart.std())
    won = rng.random((prompts, seeds)) < 1 / (1 + np.exp(-odds))
    return won.astype(float), 1.0 - won, lengths, others


def test_what_length_brought_is_taken_off():
    """A model as good as the other whose longer answers win: 0.5 at equal length, with an interval that holds it."""
    ours, theirs, lengths, others = drawn(1500, 2, 0.0, 1.5)
    level = win_rate_at_equal_length(ours, theirs, lengths, others, Resampler(1500, 200)).figure()
    assert win_rate(ours, theirs).mean() > 0.62
    assert level["mean"] == pytest.approx(0.5, abs=0.03) and level["low"] < 0.5 < level["high"]


def test_a_better_model_stays_better():
    ours, theirs, lengths, others = drawn(1500, 2, 1.0, 1.5)
    level = win_rate_at_equal_length(ours, theirs, lengths, others, Resampler(1500, 200)).figure()
    assert level["mean"] == pytest.approx(1 / (1 + math.exp(-1)), abs=0.03)


def test_the_fit_is_the_most_likely_one():
    """Found by trying: no intercept and slope on a fine grid make the wins (one of them a tie) more likely."""
    ours, theirs = np.array([[1.0], [0.0], [1.0], [1.0], [0.0], [2.0], [0.5], [1.0]]), np.array([[0.5]] * 8)
    lengths, others = np.array([[9], [4], [7], [5], [8], [6], [3], [2]]), np.array([[5]] * 8)
    found = win_rate_at_equal_length(ours, theirs, lengths, others, Resampler(8, 5)).point
    apart = (lengths - 5).ravel() / (lengths - 5).std()
    wins = win_rate(ours, theirs).ravel()
    assert sorted(set(wins)) == [0.0, 0.5, 1.0]
    intercepts, slopes = np.arange(-2, 3, 0.01), np.arange(-3, 3, 0.01)
    z = intercepts[:, None, None] + slopes[None, :, None] * np.tanh(apart)
    likelihood = (wins * -np.log1p(np.exp(-z)) + (1 - wins) * -np.log1p(np.exp(z))).sum(-1)
    best = intercepts[likelihood.argmax() // len(slopes)]
    assert found == pytest.approx(1 / (1 + math.exp(-best)), abs=0.005)


def test_where_all_is_won_it_is_one_and_equal_lengths_have_none():
    ones, zeros = np.ones((6, 1)), np.zeros((6, 1))
    lengths = np.array([[3], [9], [4], [8], [5], [7]])
    level = win_rate_at_equal_length(ones, zeros, lengths, np.full((6, 1), 6), Resampler(6, 50)).figure()
    assert level["low"] > 0.99 and level["high"] == pytest.approx(1.0)
    assert win_rate_at_equal_length(ones, zeros, lengths, lengths, Resampler(6, 50)) is None
    assert win_rate_at_equal_length(ones, zeros, lengths, lengths - 1, Resampler(6, 50)) is None, "0 is beyond what was seen"


@pytest.mark.filterwarnings("error")
def test_wins_that_follow_from_the_length_alone_are_no_error():
    lengths = np.array([[1], [2], [3], [7], [8], [9]])
    ours = (lengths > 5).astype(float)
    level = win_rate_at_equal_length(ours, 1 - ours, lengths, np.full((6, 1), 5), Resampler(6, 300)).figure()
    assert 0.0 <= level["low"] <= level["mean"] <= level["high"] <= 1.0
