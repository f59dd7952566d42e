"""Intervals of shares and correlations against published numbers, and how often they hold the truth."""

import math

import numpy as np
import pytest

from rlhf_ray.algorithms.intervals import correlation_interval, independent_trials, share_interval, wilson
from rlhf_ray.supervised.reward_metrics import heldout_figures, numbered, pair_figures


@pytest.mark.parametrize(
    "right, trials, low, high",
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilsons_interval_is_that_of_newcombe_1998(right, trials, low, high):
    """Statistics in Medicine 17, 857-872, table I, method 3."""
    assert wilson(right / trials, trials) == pytest.approx((low, high), abs=5e-5)


def test_few_pairs_that_are_all_right_say_little():
    figure = share_interval([1.0] * 3)
    assert figure["mean"] == figure["high"] == 1.0 and figure["low"] == pytest.approx(0.4385, abs=5e-5)


def test_fishers_interval_of_half_in_thirty():
    """atanh 0.5 = 0.5493, 1.96 / sqrt 27 = 0.3772; tanh of 0.1721 and 0.9265."""
    figure = correlation_interval(0.5, 30)
    assert (figure["low"], figure["high"]) == pytest.approx((0.1704, 0.7290), abs=2e-4)
    assert correlation_interval(math.nan, 30) is None
    assert correlation_interval(1.0, 3) == {"mean": 1.0, "low": -1.0, "high": 1.0}


def test_pairs_of_one_prompt_count_as_few_as_they_are_alike():
    assert independent_trials([1.0, 0.0] * 30, range(60)) == pytest.approx(60, rel=0.05)
    # Ten prompts whose six pairs are all right or all wrong are ten coin tosses; their variance is estimated from nine.
    alike = [float(prompt % 2) for prompt in range(10) for _ in range(6)]
    assert independent_trials(alike, [prompt for prompt in range(10) for _ in range(6)]) == pytest.approx(9)
    assert independent_trials([1.0] * 12, [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]) == 4


def test_the_interval_holds_the_truth_where_pairs_of_a_prompt_are_alike():
    """50 prompts of 6 pairs; each prompt has its own chance of a right pair, 0.6 on average."""
    rng = np.random.default_rng(0)
    grouped = naive = 0
    for _ in range(400):
        chances = rng.beta(1.2, 0.8, 50)
        right = (rng.random((50, 6)) < chances[:, None]).astype(float).ravel().tolist()
        for name, groups in (("grouped", [prompt for prompt in range(50) for _ in range(6)]), ("naive", None)):
            figure = share_interval(right, groups)
            held = figure["low"] <= 0.6 <= figure["high"]
            grouped, naive = grouped + (held and name == "grouped"), naive + (held and name == "naive")
    assert grouped / 400 > 0.92 > 0.85 > naive / 400


@pytest.mark.parametrize("rows", [12, 100])
def test_scores_of_a_model_that_knows_nothing_are_hardly_ever_above_chance(rows):
    rng = np.random.default_rng(1)
    wrong = {"accuracy": 0, "pearson": 0, "sign_accuracy": 0}
    for seed in range(300):
        scores = {"scores": rng.normal(size=rows), "human": rng.integers(1, 6, rows).astype(float), "lengths": np.ones(rows)}
        intervals = heldout_figures(scores, seed=seed, middle=3.0)["intervals"]
        for name in wrong:
            wrong[name] += intervals[name]["low"] > (0.0 if name == "pearson" else 0.5)
    assert all(count <= 300 * 0.045 for count in wrong.values()), wrong  # 2.5 % and chance


def test_every_accuracy_has_its_interval():
    figures = pair_figures(np.array([2.0, 1.0, 3.0]), np.array([1.0, 2.0, 0.0]), np.array([5, 2, 4]), np.array([3, 6, 4]))
    intervals = figures["intervals"]
    assert {name for name in figures if name.endswith("accuracy") and figures[name] is not None} == set(intervals)
    assert all(intervals[name]["mean"] == pytest.approx(figures[name]) for name in intervals)
    assert intervals["chosen_longer_accuracy"]["low"] == pytest.approx(wilson(1.0, 1)[0])


def test_rows_without_a_prompt_have_nothing_in_common():
    assert len(set(numbered(["", "", "a", "b", "a"]).tolist())) == 4
