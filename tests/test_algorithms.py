"""The maths of PPO on numbers: masking, KL, rewards, advantages, schedules."""

import hashlib
import math

import pytest
import torch
from masks import NAN, floats, losses, masks, ragged

from rlhf_ray.algorithms.advantage_estimators import group_centred, group_standardised, leave_one_out, rewards_to_go
from rlhf_ray.algorithms.gae import gae
from rlhf_ray.algorithms.kl import adapt_kl_coef, kl_k1, kl_k3
from rlhf_ray.algorithms.masking import masked_mean, masked_whiten
from rlhf_ray.algorithms.schedule import draw_seed, epoch_permutation, linear_anneal, minibatch_rows
from rlhf_ray.algorithms.scores import overlong_penalty, token_rewards


def test_masked_mean_counts_only_the_mask():
    values = floats([1, 2, NAN], [4, NAN, 1e30])
    assert float(masked_mean(values, masks(2, 1, 3)[:2])) == pytest.approx(7 / 3)


@pytest.mark.parametrize(
    "shift_mean, expected",
    [
        (True, [-1.5, -0.5, -0.5, -0.5, 0, 0, 1, 2]),  # mean 5, biased deviation 2 (the unbiased one is 2.138)
        (False, [3.5, 4.5, 4.5, 4.5, 5, 5, 6, 7]),
    ],
)
def test_masked_whiten_has_the_biased_variance_and_shift_mean_centres(shift_mean, expected):
    values = floats([2, 4, 4, 4, 5], [5, 7, 9, NAN, 1e30])
    mask = masks(5, 3)
    whitened = masked_whiten(values, mask, shift_mean=shift_mean)
    assert whitened[mask].tolist() == pytest.approx(expected, abs=1e-7)
    assert (whitened[~mask] == 0).all()


def test_masked_whiten_of_equal_values_is_finite():
    assert masked_whiten(floats([3, 3]), masks(2), shift_mean=True).tolist() == [[0, 0]]


def test_kl_estimators_of_one_token():
    logprobs, ref_logprobs = floats([math.log(0.5)]), floats([math.log(0.25)])
    assert float(kl_k1(logprobs, ref_logprobs)) == pytest.approx(0.6931472)
    assert float(kl_k3(logprobs, ref_logprobs)) == pytest.approx(0.5 - 1 + 0.6931472)
    assert float(kl_k1(ref_logprobs, logprobs)) == pytest.approx(-0.6931472)
    assert float(kl_k3(ref_logprobs, logprobs)) == pytest.approx(2 - 1 - 0.6931472)


def test_both_kl_estimators_are_unbiased_under_the_policy():
    policy, reference = [0.5, 0.3, 0.2], [0.2, 0.5, 0.3]
    exact = sum(p * math.log(p / q) for p, q in zip(policy, reference, strict=True))
    for estimator in (kl_k1, kl_k3):
        each = estimator(floats(policy).log(), floats(reference).log())
        assert float((floats(policy) * each).sum()) == pytest.approx(exact)


@pytest.mark.parametrize(
    "kl, expected",
    [
        (12.0, 0.1 * 1.00128),  # 1 + 0.2 * 64 / 10000: the error of 1 is clipped to 0.2
        (6.6, 0.1 * 1.00064),
        (6.0, 0.1),
        (0.0, 0.1 * 0.99872),
    ],
)
def test_adapt_kl_coef_is_the_published_controller(kl, expected):
    assert adapt_kl_coef(0.1, kl, target=6.0, horizon=10000, episodes=64) == pytest.approx(expected, rel=1e-12)


def test_the_score_is_on_the_last_action_token():
    """EOS early, EOS as the last token there is room for, and no EOS: the last True of the mask, never padding."""
    kl = floats([1, 2, NAN, NAN], [1, 1, 1, 1], [0, 0, 0, -2])
    rewards = token_rewards(floats(10, 20, 30).flatten(), kl, masks(2, 4, 4), kl_coef=0.5)
    assert rewards.tolist() == [[-0.5, 9, 0, 0], [-0.5, -0.5, -0.5, 19.5], [0, 0, 0, 31]]


def test_a_response_of_one_token_gets_its_score():
    assert token_rewards(floats(3).flatten(), floats([1, 5]), masks(1, 2)[:1], kl_coef=0.1).tolist() == [[2.9, 0]]


def lambda_returns(rewards, values, gamma, gae_lambda):
    """R_t as the mixture of n-step returns (the definition, not the recursion); lists of one row without padding."""
    last = len(rewards)
    values = [*values, 0.0]

    def n_step(t, n):
        return sum(gamma**k * rewards[t + k] for k in range(n)) + gamma**n * values[t + n]

    returns = []
    for t in range(last):
        steps = last - t
        mixture = sum((1 - gae_lambda) * gae_lambda ** (n - 1) * n_step(t, n) for n in range(1, steps))
        returns.append(mixture + gae_lambda ** (steps - 1) * n_step(t, steps))
    return returns


@pytest.mark.parametrize("gamma, gae_lambda", [(1.0, 0.95), (0.9, 0.5), (0.99, 1.0), (1.0, 0.0)])
def test_gae_is_the_mixture_of_n_step_returns(gamma, gae_lambda):
    mask, generator = ragged(seed=1)
    rewards = torch.randn(mask.shape, generator=generator, dtype=torch.float64)
    values = torch.randn(mask.shape, generator=generator, dtype=torch.float64)
    advantages, returns = gae(rewards, values, mask, gamma=gamma, gae_lambda=gae_lambda)
    for row, length in enumerate(mask.sum(1).tolist()):
        expected = lambda_returns(rewards[row, :length].tolist(), values[row, :length].tolist(), gamma, gae_lambda)
        assert returns[row, :length].tolist() == pytest.approx(expected, abs=1e-12)
        assert (advantages + values)[row, :length].tolist() == pytest.approx(expected, abs=1e-12)
        assert (advantages[row, length:] == 0).all() and (returns[row, length:] == 0).all()


@pytest.mark.parametrize("junk", [7.0, 1e30, NAN])
def test_junk_in_the_padding_changes_no_advantage(junk):
    mask, generator = ragged(seed=2)
    rewards, values = torch.randn((2, *mask.shape), generator=generator)
    clean = gae(rewards, values, mask, gamma=1.0, gae_lambda=0.95)
    spoilt = gae(torch.where(mask, rewards, junk), torch.where(mask, values, junk), mask, gamma=1.0, gae_lambda=0.95)
    assert all(torch.equal(one, other) for one, other in zip(clean, spoilt, strict=True))


def test_group_advantages_by_hand():
    """Groups of three: 1, 2, 6 (mean 3, unbiased variance 7) and 5, 5, 5."""
    rewards = torch.tensor([1.0, 2, 6, 5, 5, 5], dtype=torch.float64)
    assert leave_one_out(rewards, group_size=3).tolist() == pytest.approx([1 - 4, 2 - 3.5, 6 - 1.5, 0, 0, 0])
    assert group_centred(rewards, group_size=3).tolist() == pytest.approx([-2, -1, 3, 0, 0, 0])
    deviation = math.sqrt(7) + 1e-4
    expected = [-2 / deviation, -1 / deviation, 3 / deviation, 0, 0, 0]
    assert group_standardised(rewards, group_size=3).tolist() == pytest.approx(expected)


def test_rewards_to_go_by_hand():
    rewards = floats([1, 2, 4], [8, NAN, NAN])
    result = rewards_to_go(rewards, masks(3, 1), gamma=0.5)
    assert result.tolist() == [[1 + 0.5 * (2 + 0.5 * 4), 2 + 0.5 * 4, 4], [8, 0, 0]]


def test_the_overlong_penalty_by_hand():
    """At most 20 tokens, a buffer of 5: nothing up to 15, then a fifth for each token."""
    lengths = floats(1, 15, 16, 18, 20).flatten()
    assert overlong_penalty(lengths, longest=20, buffer=5).tolist() == pytest.approx([0, 0, 0.2, 0.6, 1])


def test_draw_seed_stays_what_it_is():
    """Another value would change every run; the literal was worked out from the definition."""
    assert draw_seed(7, "rollout", 3, 12, 0) == 8473855460863503592
    digest = hashlib.blake2b(b"7/rollout/3/12/0", digest_size=8).digest()
    assert draw_seed(7, "rollout", 3, 12, 0) == int.from_bytes(digest, "little") // 2


def test_draw_seed_tells_keys_apart_and_fits_63_bits():
    keys = [(seed, step, prompt) for seed in range(3) for step in range(12) for prompt in range(12)]
    seeds = {draw_seed(*key) for key in keys}
    assert len(seeds) == len(keys)  # (1, 11) and (11, 1) among them
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_linear_anneal_by_hand():
    assert [linear_anneal(8.0, step, 4) for step in range(4)] == [8.0, 6.0, 4.0, 2.0]


def test_a_tie_of_clipped_and_unclipped_is_not_clipped():
    """Inside the range the two are equal."""
    ratios = floats([1.0, 1.1, 1.3])
    _, stats = losses("policy", ratios.log(), torch.zeros_like(ratios), torch.ones_like(ratios), masks(3), num_tokens=3)
    assert float(stats["policy/clip_frac"]) == pytest.approx(1 / 3)


def test_each_epochs_minibatches_are_drawn_by_a_key_of_their_own():
    found = minibatch_rows(12, 4, 2, 77)
    for epoch in (0, 1):
        order = epoch_permutation(12, draw_seed(77, "epoch", epoch))
        parts = [sorted(order[start : start + 4]) for start in (0, 4, 8)]
        assert [sorted(part) for part in found[3 * epoch : 3 * epoch + 3]] == parts


def test_epoch_permutation_depends_on_the_seed_alone():
    torch.manual_seed(5)
    first = epoch_permutation(50, seed=3)
    torch.manual_seed(6)
    assert epoch_permutation(50, seed=3) == first != epoch_permutation(50, seed=4)
    assert sorted(first) == list(range(50))


def test_minibatches_cover_every_row_in_every_epoch():
    steps = minibatch_rows(12, 4, ppo_epochs=3, seed=9)
    assert len(steps) == 9 and all(len(rows) == 4 and rows == sorted(rows) for rows in steps)
    epochs = [steps[i : i + 3] for i in (0, 3, 6)]
    assert all(sorted(row for rows in epoch for row in rows) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert steps == minibatch_rows(12, 4, ppo_epochs=3, seed=9) != minibatch_rows(12, 4, ppo_epochs=3, seed=10)
