"""Reward-model figures against numbers worked by hand."""

import math

import numpy as np
import pytest

from rlhf_ray.config import RewardConfig
from rlhf_ray.supervised.ensemble import ensemble_figures
from rlhf_ray.supervised.reward_metrics import (
    accuracy_by_length,
    average_ranks,
    calibration,
    expected_calibration_error,
    longer_accuracy,
    pair_accuracy,
    pair_figures,
    pairs_of_scored,
    pearson,
    score_figures,
    spearman,
)


def test_accuracy_counts_a_tie_half():
    # right, right, wrong, tie: 2.5 of 4
    assert pair_accuracy(np.array([1.0, 0.1, -2.0, 0.0])) == 0.625


def test_always_the_longer():
    # longer chosen, shorter chosen, equal, longer chosen: (1 + 0 + 0.5 + 1) / 4
    assert longer_accuracy(np.array([5, 2, 3, 9]), np.array([3, 4, 3, 1])) == 0.625


def test_calibration_error_of_two_bins_worked_by_hand():
    # sigmoid(log 3) = 0.75 falls in [0.75, 0.8), sigmoid(log 19) = 0.95 in [0.95, 1]. At 0.75: one right of two, gap
    # |0.75 - 0.5| = 0.25. At 0.95: both right, gap 0.05. Half the pairs each: 0.125 + 0.025.
    log3, log19 = math.log(3.0001), math.log(19.0001)
    margins = np.array([log3, -log3, log19, log19])
    assert expected_calibration_error(margins) == pytest.approx(0.15, abs=1e-4)
    first, last = calibration(margins)
    assert first == pytest.approx({"predicted": 0.75, "observed": 0.5, "count": 2}, abs=1e-4)
    assert last == pytest.approx({"predicted": 0.95, "observed": 1.0, "count": 2}, abs=1e-4)


def test_calibration_error_sees_overconfidence_and_not_only_rightness():
    sure_and_right_half_the_time = np.array([20.0, -20.0] * 10)
    assert expected_calibration_error(sure_and_right_half_the_time) == pytest.approx(0.5, abs=1e-6)
    assert expected_calibration_error(np.zeros(10)) == pytest.approx(0.0, abs=1e-12)  # says 50 %, counts half


def test_calibration_error_is_that_of_a_simulated_annotator_near_zero():
    rng = np.random.default_rng(0)
    true_margin = rng.normal(0, 2, 200_000)
    agrees = rng.random(len(true_margin)) < 1 / (1 + np.exp(-true_margin))
    assert expected_calibration_error(np.where(agrees, true_margin, -true_margin)) < 0.01
    assert expected_calibration_error(4 * np.where(agrees, true_margin, -true_margin)) > 0.1


def test_average_ranks_with_ties():
    # 1 is rank 1; the two 2s fill ranks 2 and 3; the three 5s fill 4, 5, 6
    np.testing.assert_array_equal(average_ranks(np.array([5, 2, 5, 1, 2, 5])), [5, 2.5, 5, 1, 2.5, 5])


def test_pearson_by_hand():
    # x - mean = (-1.5, -.5, .5, 1.5), y - mean = (-1, -2, 2, 1): products 1.5 + 1 + 1 + 1.5; norms sqrt(5), sqrt(10)
    assert pearson(np.array([1, 2, 3, 4]), np.array([2, 1, 5, 4])) == pytest.approx(5 / math.sqrt(50))
    assert math.isnan(pearson(np.ones(3), np.arange(3)))


def test_spearman_by_hand_without_and_with_ties():
    # No ties: 1 - 6 * sum(d^2) / (n (n^2 - 1)); ranks (1,2,3,4,5) and (2,1,4,3,5) differ by 1 four times: 1 - 24/120.
    assert spearman(np.array([10, 20, 30, 40, 50]), np.array([7, 5, 90, 80, 1e6])) == pytest.approx(0.8)
    # Ties: ranks (1.5, 1.5, 3) and (1, 2, 3): deviations (-.5, -.5, 1) and (-1, 0, 1); 1.5 / sqrt(1.5 * 2).
    assert spearman(np.array([4, 4, 9]), np.array([1, 2, 3])) == pytest.approx(1.5 / math.sqrt(3))


def test_pairs_of_scored_rows_are_ordered_different_and_seeded():
    scores = np.array([1, 1, 4, 10, 10, 7])
    better, worse = pairs_of_scored(scores, seed=3, pairs=50)
    assert len(better) == len(worse) == 50
    assert (scores[better] > scores[worse]).all()
    np.testing.assert_array_equal(better, pairs_of_scored(scores, seed=3, pairs=50)[0])
    assert not np.array_equal(better, pairs_of_scored(scores, seed=4, pairs=50)[0])
    assert len(pairs_of_scored(np.ones(5), seed=0, pairs=3)[0]) == 0


def test_accuracy_where_the_longer_and_where_the_shorter_was_chosen():
    # Chosen longer: right, right, wrong: 2 of 3. Chosen shorter: wrong, tie: 0.5 of 2. The last pair is of equal length.
    margins = np.array([1.0, 2.0, -1.0, -3.0, 0.0, 5.0])
    chosen, rejected = np.array([5, 9, 4, 2, 1, 3]), np.array([3, 8, 1, 7, 6, 3])
    assert accuracy_by_length(margins, chosen, rejected) == {
        "chosen_longer_accuracy": pytest.approx(2 / 3), "chosen_longer_pairs": 3,
        "chosen_shorter_accuracy": 0.25, "chosen_shorter_pairs": 2,
    }  # fmt: skip
    nothing = accuracy_by_length(margins[:1], chosen[:1], rejected[:1])
    assert nothing["chosen_shorter_accuracy"] is None and nothing["chosen_shorter_pairs"] == 0


def test_how_far_a_score_goes_with_length():
    # Texts of 1, 2 (chosen) and 5, 4 (rejected) tokens score 1, 2, 3, 9: Pearson by numpy, ranks (1,2,3,4) and (1,2,4,3).
    figures = pair_figures(np.array([1.0, 2.0]), np.array([3.0, 9.0]), np.array([1, 2]), np.array([5, 4]))
    assert figures["length_pearson"] == pytest.approx(np.corrcoef([1, 2, 3, 9], [1, 2, 5, 4])[0, 1])
    assert figures["length_spearman"] == pytest.approx(0.8)  # 1 - 6 * 2 / (4 * 15)
    scored = score_figures(np.array([1.0, 2, 3, 9]), np.arange(4.0), np.array([1, 2, 5, 4]), seed=0, middle=1.5)
    assert scored["length_spearman"] == pytest.approx(0.8), "of the rows, not of pairs made of them"


def test_an_ensemble_is_measured_by_its_normalised_scores():
    """Member 1 scores in tens, (raw - 5) / 10. The members' margins are 2 and -1, and -0.5 and 0.9 when normalised: the
    mean has one pair right (0.75, -0.05)."""
    lengths = {"chosen_lengths": np.array([3, 3]), "rejected_lengths": np.array([2, 2]), "seed": np.array(0)}
    left = [
        {"chosen": np.array([2.0, -1.0]), "rejected": np.array([0.0, 0.0]), **lengths},
        {"chosen": np.array([15.0, 1.0]), "rejected": np.array([20.0, -8.0]), **lengths},
    ]
    moments = [(0.0, 1.0), (5.0, 10.0)]
    mean = ensemble_figures(left, moments, RewardConfig(members=2))
    assert mean["accuracy"] == 0.5 and mean["eval_rows"] == 2 and "ece" not in mean
    # chosen: (2, 1) and (-1, -0.4); rejected: (0, 1.5) and (0, -1.3): deviations 0.5, 0.3, 0.75, 0.65
    assert mean["disagreement"] == pytest.approx((0.5 + 0.3 + 0.75 + 0.65) / 4)
    # lowest: chosen 1, -1; rejected 0, -1.3: both pairs right
    assert ensemble_figures(left, moments, RewardConfig(members=2, combine="worst"))["accuracy"] == 1.0


def test_figures_hold_every_measure():
    figures = pair_figures(np.array([1.0, 2.0]), np.array([0.0, 3.0]), np.array([4, 4]), np.array([3, 3]))
    assert figures["accuracy"] == 0.5 and figures["longer_accuracy"] == 1.0 and figures["pairs"] == 2
    human = np.array([1, 3, 8, 10])
    figures = score_figures(human * 0.1 - 0.2, human, np.array([9, 5, 3, 1]), seed=0, middle=5.5)
    assert figures["sign_accuracy"] == 0.75  # 3 is below 5.5, but predicted above 0
    assert figures["accuracy"] == 1.0 and figures["longer_accuracy"] == 0.0
    assert figures["pearson"] == pytest.approx(1) and figures["spearman"] == pytest.approx(1)
