"""All of PPO's maths together: advantages and returns of batches worked out by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from masks import CONFIG, NAN, floats, masks

from rlhf_ray.algorithms.experience import assemble
from rlhf_ray.algorithms.off_policy import mismatch
from rlhf_ray.algorithms.scores import end_scores
from rlhf_ray.tables.advantages import ADVANTAGES


def hand_worked(**options):
    """Row 0: three tokens, no EOS, score 2 less a penalty of 1. Row 1: two tokens and EOS, score 1. kl_coef 0.1."""
    mask = masks(3, 2)
    return mask, assemble(
        floats(2, 1).flatten(),
        torch.tensor([False, True]),
        rollout_logprobs=floats([-1.25, -2, -3], [-1, -1, NAN]),
        old_logprobs=floats([-1, -2, -3], [-1, -1, NAN]),
        ref_logprobs=floats([-2, -2, -2], [-3, -3, NAN]),
        old_values=floats([0.5, 0.5, 0.5], [0, 0.2, NAN]),
        action_mask=mask,
        config=replace(CONFIG, **options),
        kl_coef=0.1,
    )


def test_assemble_by_hand():
    """kl [1, 0, -1], [2, 2]; rewards [-0.1, 0, 1.1], [-0.2, 0.8]; deltas [-0.1, 0, 0.6], [0, 0.6]."""
    mask, result = hand_worked()
    assert result.advantages[mask].tolist() == pytest.approx([0.05, 0.3, 0.6, 0.3, 0.6])
    assert result.returns[mask].tolist() == pytest.approx([0.55, 0.8, 1.1, 0.3, 0.8])
    assert (result.advantages[~mask] == 0).all() and (result.returns[~mask] == 0).all()
    returns = np.array([0.55, 0.8, 1.1, 0.3, 0.8])
    errors = returns - [0.5, 0.5, 0.5, 0, 0.2]
    assert result.stats == pytest.approx(
        {
            "objective/score": 1.5,
            "objective/score_std": 0.5,
            "objective/score_length_corr": 1.0,  # the longer of two scores higher
            "objective/kl": 2.0,  # (0 + 4) / 2: summed over a sequence
            "objective/rlhf_reward": 0.8,  # (1.0 + 0.6) / 2
            "objective/kl_coef": 0.1,
            "objective/response_length": 2.5,
            "objective/eos_rate": 0.5,
            "value/explained_variance": 1 - errors.var() / returns.var(),
            "value/returns": 0.71,
            "policy/advantage_std": math.sqrt(0.0436),
            "policy/mismatch_p99": 0.25,
            "policy/mismatch_max": 0.25,
            "policy/mismatch_kl": (math.exp(0.25) - 1.25) / 5,  # k3 of one gap of -0.25
        }
    )


def test_assemble_whitens_advantages_over_the_batch_and_not_the_returns():
    """Mean 0.37 and biased variance 0.0436 of the advantages above."""
    mask, result = hand_worked(whiten_advantages=True)
    expected = (np.array([0.05, 0.3, 0.6, 0.3, 0.6]) - 0.37) / math.sqrt(0.0436)
    assert result.advantages[mask].tolist() == pytest.approx(expected.tolist(), abs=1e-6)
    assert result.returns[mask].tolist() == pytest.approx([0.55, 0.8, 1.1, 0.3, 0.8])
    assert (result.advantages[~mask] == 0).all()


def test_assemble_whitens_rewards_keeping_their_mean():
    """Rewards [-0.1, 0, 1.1, -0.2, 0.8]: mean 0.32, biased variance 0.2776. With lambda 1 returns are their sums."""
    mask, result = hand_worked(whiten_rewards=True, gae_lambda=1.0)
    white = (np.array([-0.1, 0, 1.1, -0.2, 0.8]) - 0.32) / math.sqrt(0.2776) + 0.32
    expected = [white[:3].sum(), white[1:3].sum(), white[2], white[3:].sum(), white[4]]
    assert result.returns[mask].tolist() == pytest.approx(expected, abs=1e-6)
    assert result.stats["objective/rlhf_reward"] == pytest.approx(0.8)  # what was maximised, before whitening


def test_scores_are_cut_then_lowered_or_replaced_where_the_response_did_not_end():
    scores, ended = torch.tensor([5.0, -7.0, 0.5, 5.0]), torch.tensor([True, True, False, False])
    plain = end_scores(scores, ended, clip=None, penalty=2.0, replacement=None)
    assert plain.tolist() == [5.0, -7.0, -1.5, 3.0]
    cut = end_scores(scores, ended, clip=3.0, penalty=2.0, replacement=None)
    assert cut.tolist() == [3.0, -3.0, -1.5, 1.0]
    replaced = end_scores(scores, ended, clip=3.0, penalty=0.0, replacement=-1.0)
    assert replaced.tolist() == [3.0, -3.0, -1.0, -1.0]


def test_assemble_cuts_and_replaces_scores():
    """Of the scores 2 (no EOS) and 1: cut to 0.5 both, less the penalty of 1; or -3 in place of the first."""
    _, cut = hand_worked(score_clip=0.5)
    _, replaced = hand_worked(missing_eos_penalty=0.0, missing_eos_score=-3.0)
    kl = 0.1 * np.array([0, 4])
    assert cut.stats["objective/rlhf_reward"] == pytest.approx(np.mean([-0.5, 0.5] - kl))
    assert replaced.stats["objective/rlhf_reward"] == pytest.approx(np.mean([-3.0, 1.0] - kl))


def test_the_missing_eos_penalty_is_for_responses_that_did_not_end():
    _, without = hand_worked(missing_eos_penalty=0.0, gae_lambda=1.0)
    _, with_penalty = hand_worked(missing_eos_penalty=2.5, gae_lambda=1.0)
    np.testing.assert_allclose(without.returns - with_penalty.returns, [[2.5, 2.5, 2.5], [0, 0, 0]], atol=1e-12)


def group_of_two(**options):
    """`hand_worked` as two samples of one prompt: penalised scores 1 and 1, less 0.1 * (0, 4) of KL: rewards 1 and 0.6."""
    return hand_worked(group_size=2, **options)


@pytest.mark.parametrize("advantage, first", [
    ("rloo", 1 - 0.6), ("dr_grpo", 1 - 0.8), ("grpo", 0.2 / (math.sqrt(0.08) + 1e-4)),
])  # fmt: skip
def test_a_group_advantage_is_the_same_for_all_tokens_of_a_response(advantage, first):
    mask, result = group_of_two(advantage=ADVANTAGES[advantage])
    assert result.advantages[mask].tolist() == pytest.approx([first] * 3 + [-first] * 2)
    assert (result.advantages[~mask] == 0).all()
    assert result.returns is None and not any(name.startswith("value/") for name in result.stats)
    assert result.stats["objective/zero_variance_groups"] == 1.0  # equal before the KL


def test_a_kl_in_the_loss_is_not_in_the_reward_too():
    """Penalised scores alone are 1 and 1; with an over-long penalty of 1 for the three tokens they are 0 and 1."""
    mask, result = group_of_two(advantage=ADVANTAGES["dr_grpo"], kl_in_reward=False, overlong_buffer=1)
    assert result.advantages[mask].tolist() == pytest.approx([-0.5] * 3 + [0.5] * 2)
    assert result.stats["objective/kl"] == 2.0 and result.stats["objective/zero_variance_groups"] == 0.0
    assert result.stats["objective/rlhf_reward"] == pytest.approx(0.5 - 0.1 * 2.0)  # what is maximised, either way


def test_reinforce_pp_is_the_reward_to_go():
    """Rewards [-0.1, 0, 1.1] and [-0.2, 0.8]; the baseline form takes the group's mean of 1 off the scores first."""
    mask, result = group_of_two(advantage=ADVANTAGES["reinforce_pp"])
    assert result.advantages[mask].tolist() == pytest.approx([1.0, 1.1, 1.1, 0.6, 0.8])
    mask, result = group_of_two(advantage=ADVANTAGES["reinforce_pp_baseline"])
    assert result.advantages[mask].tolist() == pytest.approx([0.0, 0.1, 0.1, -0.4, -0.2])


@pytest.mark.parametrize("estimator, expected", [
    ("k2", [0.05 * 1 + 0 + 0.05, 0.2 + 0.2]),  # halves of squares of [1, 0, -1] and [2, 2], times 0.1
    ("k3", [0.1 * (math.exp(-1) + 0 + math.e - 2), 0.1 * 2 * (math.exp(-2) + 1)]),
])  # fmt: skip
def test_the_estimator_of_the_kl_in_the_reward(estimator, expected):
    _, result = hand_worked(kl_estimator=estimator, gae_lambda=1.0, missing_eos_penalty=0.0)
    total = result.returns[:, 0]  # with lambda 1 and gamma 1: score less the penalties
    assert total.tolist() == pytest.approx([2 - expected[0], 1 - expected[1]])
    assert result.stats["objective/kl"] == pytest.approx(2.0)  # the metric stays k1


def test_the_mismatch_of_many_tokens():
    """100 gaps of 0, 1, ... 99 hundredths: 98 of them are at most 0.97, 99 at most 0.98."""
    gaps = torch.arange(100, dtype=torch.float64).view(4, 25) / 100
    own, mask = torch.full((4, 25), -1.0, dtype=torch.float64), torch.ones(4, 25, dtype=torch.bool)
    found = mismatch(own, own + gaps, mask)
    assert found["policy/mismatch_p99"] == pytest.approx(0.98) and found["policy/mismatch_max"] == pytest.approx(0.99)
    brute = sum(math.exp(-place / 100) - 1 + place / 100 for place in range(100)) / 100
    assert found["policy/mismatch_kl"] == pytest.approx(brute)
