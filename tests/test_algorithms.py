"""PPO's maths against numbers worked out by hand, and against brute force in float64 from the formulas."""

import hashlib
import math

import numpy as np
import pytest
import torch

from rlhf_ray.algorithms.assemble import assemble
from rlhf_ray.algorithms.gae import gae
from rlhf_ray.algorithms.kl import adapt_kl_coef, kl_k1, kl_k3
from rlhf_ray.algorithms.logprobs import entropy, selected_logprobs
from rlhf_ray.algorithms.losses import explained_variance, policy_loss, value_loss
from rlhf_ray.algorithms.masking import masked_mean, masked_whiten
from rlhf_ray.algorithms.rewards import token_rewards
from rlhf_ray.algorithms.schedule import draw_seed, epoch_permutation, linear_anneal, minibatch_rows

NAN = float("nan")


def masks(*lengths):
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def floats(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def ragged(seed, rows=5, width=7):
    """(mask, generator) of rows with 1..width tokens, the longest among them."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, width + 1, (rows,), generator=generator).tolist()
    return masks(*lengths[:-1], width), generator


# -- masking ----------------------------------------------------------------------------------------------------------


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


# -- KL ---------------------------------------------------------------------------------------------------------------


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


# -- rewards ----------------------------------------------------------------------------------------------------------


def test_the_score_is_on_the_last_action_token():
    """EOS early, EOS as the last token there is room for, and no EOS: the last True of the mask, never padding."""
    kl = floats([1, 2, NAN, NAN], [1, 1, 1, 1], [0, 0, 0, -2])
    rewards = token_rewards(floats(10, 20, 30).flatten(), kl, masks(2, 4, 4), kl_coef=0.5)
    assert rewards.tolist() == [[-0.5, 9, 0, 0], [-0.5, -0.5, -0.5, 19.5], [0, 0, 0, 31]]


def test_a_response_of_one_token_gets_its_score():
    assert token_rewards(floats(3).flatten(), floats([1, 5]), masks(1, 2)[:1], kl_coef=0.1).tolist() == [[2.9, 0]]


# -- advantages -------------------------------------------------------------------------------------------------------


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


# -- losses -----------------------------------------------------------------------------------------------------------


def test_policy_loss_by_hand():
    """Ratios 1.5 and 0.5 with advantages 1 and -1, clip range 0.2, and a minibatch of 8 tokens of which these are 4."""
    ratios, advantages = floats([1.5, 1.5, 0.5], [0.5, NAN, NAN]), floats([1, -1, -1], [1, NAN, NAN])
    old_logprobs = torch.zeros_like(ratios)
    loss, stats = policy_loss(ratios.log(), old_logprobs, advantages, masks(3, 1), clip_range=0.2, num_tokens=8)
    assert loss.item() == pytest.approx((-1.2 + 1.5 + 0.8 - 0.5) / 8)
    assert {name: float(value) for name, value in stats.items()} == pytest.approx(
        {
            "policy/loss": 0.6 / 8,
            "policy/clip_frac": 2 / 8,  # the first and the third
            "policy/ratio": (1.5 + 1.5 + 0.5 + 0.5) / 8,
            "policy/approx_kl": (2 * 0.0945349 + 2 * 0.1931472) / 8,  # r - 1 - ln r
        },
        abs=1e-7,
    )


def plain_policy_loss(logprobs, old_logprobs, advantages, mask, clip_range, num_tokens):
    total = 0.0
    for row, column in np.argwhere(mask):
        ratio = math.exp(logprobs[row, column] - old_logprobs[row, column])
        bounded = min(max(ratio, 1 - clip_range), 1 + clip_range)
        total += max(-advantages[row, column] * ratio, -advantages[row, column] * bounded)
    return total / num_tokens


def plain_value_loss(values, old_values, returns, mask, clip_range, num_tokens):
    total = 0.0
    for row, column in np.argwhere(mask):
        low, high = old_values[row, column] - clip_range, old_values[row, column] + clip_range
        bounded = min(max(values[row, column], low), high)
        target = returns[row, column]
        total += 0.5 * max((values[row, column] - target) ** 2, (bounded - target) ** 2)
    return total / num_tokens


def numeric_gradient(function, at, step=1e-6):
    gradient = np.zeros_like(at)
    for index in np.ndindex(at.shape):
        up, down = at.copy(), at.copy()
        up[index] += step
        down[index] -= step
        gradient[index] = (function(up) - function(down)) / (2 * step)
    return gradient


def losses(kind, now, old, target, mask, num_tokens):
    if kind == "policy":
        return policy_loss(now, old, target, mask, clip_range=0.2, num_tokens=num_tokens)
    return value_loss(now, old, target, mask, value_clip_range=0.2, num_tokens=num_tokens)


@pytest.mark.parametrize("kind, plain", [("policy", plain_policy_loss), ("value", plain_value_loss)])
def test_loss_and_gradient_against_brute_force(kind, plain):
    mask, generator = ragged(seed=3, rows=6)
    now, old, target = torch.randn((3, *mask.shape), generator=generator, dtype=torch.float64) * 0.5
    now = now.requires_grad_()
    loss, _ = losses(kind, now, old, target, mask, num_tokens=40)
    loss.backward()
    arrays = old.numpy(), target.numpy(), mask.numpy(), 0.2, 40
    assert loss.item() == pytest.approx(plain(now.detach().numpy(), *arrays), rel=1e-12)
    expected = numeric_gradient(lambda values: plain(values, *arrays), now.detach().numpy())
    assert np.abs(expected).max() > 0.01
    np.testing.assert_allclose(now.grad.numpy(), expected, atol=1e-8, rtol=0)


@pytest.mark.parametrize("kind", ["policy", "value"])
@pytest.mark.parametrize("junk", [50.0, 1e30, NAN])
def test_junk_in_the_padding_changes_no_loss_and_no_gradient(kind, junk):
    mask, generator = ragged(seed=4)
    now, old, target = torch.randn((3, *mask.shape), generator=generator)

    def run(*parts):
        leaf = parts[0].clone().requires_grad_()
        loss, stats = losses(kind, leaf, *parts[1:], mask, num_tokens=int(mask.sum()))
        loss.backward()
        return [loss.detach(), leaf.grad, *stats.values()]

    spoilt = [torch.where(mask, part, junk) for part in (now, old, target)]
    assert all(torch.equal(one, other) for one, other in zip(run(now, old, target), run(*spoilt), strict=True))


@pytest.mark.parametrize("kind", ["policy", "value"])
def test_loss_and_statistics_add_up_over_any_split(kind):
    """Uneven parts, each divided by the whole minibatch's tokens: means of means would differ."""
    mask, generator = ragged(seed=5, rows=6)
    now, old, target = torch.randn((3, *mask.shape), generator=generator, dtype=torch.float64)
    whole_loss, whole = losses(kind, now, old, target, mask, int(mask.sum()))
    parts = [losses(kind, now[i], old[i], target[i], mask[i], int(mask.sum())) for i in ([0], [1, 2], [3, 4, 5])]
    assert float(sum(loss for loss, _ in parts)) == pytest.approx(float(whole_loss), rel=1e-12)
    for name, value in whole.items():
        assert float(sum(stats[name] for _, stats in parts)) == pytest.approx(float(value), rel=1e-12), name


def test_value_loss_by_hand():
    """(V, V_old, R): clipped is worse; inside the clip; clipped would be better, so the unclipped one counts."""
    values, old_values, returns = floats([1, 3, 1]), floats([0, 2.9, 0]), floats([2, 2, 0])
    loss, stats = value_loss(values, old_values, returns, masks(3), value_clip_range=0.2, num_tokens=6)
    assert loss.item() == pytest.approx(0.5 * (1.8**2 + 1 + 1) / 6)
    assert float(stats["value/clip_frac"]) == pytest.approx(1 / 6)
    assert float(stats["value/loss"]) == pytest.approx(float(loss))


def test_explained_variance_by_hand():
    mask = masks(2, 1)
    returns = floats([1, 2], [3, NAN])
    assert explained_variance(floats([1, 2], [2, NAN]), returns, mask) == pytest.approx(2 / 3)  # 1 - (2/9) / (2/3)
    assert explained_variance(returns, returns, mask) == pytest.approx(1)
    assert explained_variance(floats([0, 0], [0, 9]), floats([4, 4], [4, 9]), mask) == 0  # they don't vary


# -- log-probs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature, first", [(1.0, 1 / 4), (0.5, 1 / 10), (2.0, 1 / (1 + math.sqrt(3)))])
def test_selected_logprobs_and_entropy_of_two_tokens(temperature, first):
    logits = floats([0, math.log(3)], [0, math.log(3)])[None]
    logprobs = selected_logprobs(logits, torch.tensor([[0, 1]]), temperature=temperature)
    assert logprobs.exp().flatten().tolist() == pytest.approx([first, 1 - first], abs=1e-6)
    expected = -first * math.log(first) - (1 - first) * math.log(1 - first)
    assert entropy(logits, temperature=temperature).flatten().tolist() == pytest.approx([expected] * 2, abs=1e-6)


def test_selected_logprobs_are_float32_and_hold_for_large_logits():
    logits = torch.tensor([[[1000.0, 0.0, -1000.0]]], dtype=torch.bfloat16)
    logprobs = selected_logprobs(logits, torch.tensor([[1]]), temperature=1.0)
    assert logprobs.dtype == torch.float32 and float(logprobs) == -1000.0
    assert float(entropy(logits, temperature=1.0)) == 0.0


# -- schedule ---------------------------------------------------------------------------------------------------------


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


# -- all together -----------------------------------------------------------------------------------------------------


def hand_worked(**knobs):
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
        **{
            "kl_coef": 0.1,
            "gamma": 1.0,
            "gae_lambda": 0.5,
            "missing_eos_penalty": 1.0,
            "whiten_rewards": False,
            "whiten_advantages": False,
            **knobs,
        },
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
            "objective/kl": 2.0,  # (0 + 4) / 2: summed over a sequence
            "objective/rlhf_reward": 0.8,  # (1.0 + 0.6) / 2
            "objective/kl_coef": 0.1,
            "objective/response_length": 2.5,
            "objective/eos_rate": 0.5,
            "value/explained_variance": 1 - errors.var() / returns.var(),
            "value/returns": 0.71,
            "policy/advantage_std": math.sqrt(0.0436),
            "policy/mismatch_max": 0.25,
            "policy/mismatch_kl": -0.05,
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
    assert result.stats["objective/rlhf_reward"] == pytest.approx(0.8)  # as it was paid, before whitening


def test_the_missing_eos_penalty_is_for_responses_that_did_not_end():
    _, without = hand_worked(missing_eos_penalty=0.0, gae_lambda=1.0)
    _, with_penalty = hand_worked(missing_eos_penalty=2.5, gae_lambda=1.0)
    np.testing.assert_allclose(without.returns - with_penalty.returns, [[2.5, 2.5, 2.5], [0, 0, 0]], atol=1e-12)
