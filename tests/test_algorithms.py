"""PPO's maths against numbers worked out by hand, and against brute force in float64 from the formulas."""

import hashlib
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from rlhf_ray.algorithms.advantages import group_centred, group_standardised, leave_one_out, rewards_to_go
from rlhf_ray.algorithms.experience import AdvantageConfig, assemble
from rlhf_ray.algorithms.gae import gae
from rlhf_ray.algorithms.kl import adapt_kl_coef, kl_k1, kl_k3
from rlhf_ray.algorithms.logprobs import entropy, selected_logprobs, selected_logprobs_and_entropy
from rlhf_ray.algorithms.losses import (
    entropy_bonus,
    explained_variance,
    kl_loss,
    policy_loss,
    token_weights,
    value_loss,
)
from rlhf_ray.algorithms.masking import masked_mean, masked_whiten
from rlhf_ray.algorithms.off_policy import mismatch
from rlhf_ray.algorithms.schedule import draw_seed, epoch_permutation, linear_anneal, minibatch_rows
from rlhf_ray.algorithms.scores import end_scores, overlong_penalty, token_rewards
from rlhf_ray.tables.advantages import ADVANTAGES

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


# -- advantages without a critic --------------------------------------------------------------------------------------


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


# -- losses -----------------------------------------------------------------------------------------------------------


def test_policy_loss_by_hand():
    """Ratios 1.5 and 0.5 with advantages 1 and -1, clip range 0.2, and a minibatch of 8 tokens of which these are 4."""
    ratios, advantages = floats([1.5, 1.5, 0.5], [0.5, NAN, NAN]), floats([1, -1, -1], [1, NAN, NAN])
    old_logprobs = torch.zeros_like(ratios)
    loss, stats = losses("policy", ratios.log(), old_logprobs, advantages, masks(3, 1), num_tokens=8)
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


def losses(kind, now, old, target, mask, num_tokens, **options):
    if kind == "policy":
        weights = token_weights(
            mask, "token", num_tokens=num_tokens, num_sequences=0, max_new_tokens=0, dtype=now.dtype
        )
        options = {"clip_range": 0.2, "clip_range_high": 0.2, "dual_clip": None} | options
        return policy_loss(now, old, target, mask, weights, num_tokens=num_tokens, **options)
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


@pytest.mark.parametrize(
    "aggregation, expected",
    [
        ("token", [[1 / 10, 1 / 10, 1 / 10], [1 / 10, 0, 0]]),
        ("sequence_sum", [[1 / 4, 1 / 4, 1 / 4], [1 / 4, 0, 0]]),
        ("sequence_mean", [[1 / 12, 1 / 12, 1 / 12], [1 / 4, 0, 0]]),
        ("constant", [[1 / 20, 1 / 20, 1 / 20], [1 / 20, 0, 0]]),
    ],
)
def test_how_much_each_token_counts(aggregation, expected):
    """Two rows of a minibatch of 4 rollouts with 10 tokens, at most 5 in each."""
    weights = token_weights(masks(3, 1), aggregation, num_tokens=10, num_sequences=4, max_new_tokens=5)
    np.testing.assert_allclose(weights, expected, atol=1e-7)


def plain_clipped(ratio, advantage, low, high, dual_clip):
    """Case by case, as the figures in the PPO and dual-clip papers are drawn."""
    if advantage >= 0:
        return -advantage * min(ratio, 1 + high)
    loss = -advantage * max(ratio, 1 - low)
    return min(loss, -advantage * dual_clip) if dual_clip is not None else loss


@pytest.mark.parametrize("high, dual_clip", [(0.28, None), (0.2, 3.0), (0.5, 1.5)])
def test_clip_higher_and_dual_clip_case_by_case(high, dual_clip):
    ratios = [0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 1.27, 1.29, 1.49, 1.51, 2.9, 3.1, 20.0]
    for advantage in (1.5, 0.4, -0.7):
        for ratio in ratios:
            log_ratio = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
            zero, mask = torch.zeros(1, 1, dtype=torch.float64), masks(1)
            options = {"clip_range_high": high, "dual_clip": dual_clip}
            loss, _ = losses("policy", log_ratio, zero, zero + advantage, mask, 1, **options)
            loss.backward()

            def plain(value, advantage=advantage):
                return plain_clipped(math.exp(value), advantage, 0.2, high, dual_clip)

            at = math.log(ratio)
            assert loss.item() == pytest.approx(plain(at), rel=1e-12)
            slope = (plain(at + 1e-7) - plain(at - 1e-7)) / 2e-7
            assert log_ratio.grad.item() == pytest.approx(slope, abs=1e-5)


def reverse_kl(logits, reference):
    """KL(softmax(logits) || reference), by the definition."""
    policy = np.exp(logits) / np.exp(logits).sum()
    return float((policy * np.log(policy / reference)).sum())


def forward_kl(logits, reference):
    policy = np.exp(logits) / np.exp(logits).sum()
    return float((reference * np.log(reference / policy)).sum())


@pytest.mark.parametrize(
    "estimator, whose", [("k1", lambda *_: 0.0), ("k2", reverse_kl), ("k3", forward_kl)], ids=["k1", "k2", "k3"]
)
def test_what_the_kl_loss_really_descends(estimator, whose):
    """Over all tokens of a vocabulary of 4, weighted by the policy: the expected gradient of each estimator.

    k1's is zero, so it holds nothing back; k2's is that of KL(policy || reference), which PPO's penalty means; k3's is
    that of KL(reference || policy).
    """
    logits, reference = np.array([0.5, -1.0, 0.2, 1.3]), np.array([0.4, 0.3, 0.2, 0.1])
    expected = numeric_gradient(lambda at: whose(at, reference), logits)
    leaf = torch.tensor(logits, requires_grad=True)
    logprobs = leaf.log_softmax(0)
    one = torch.ones(1, 1, dtype=torch.float64)
    for token in range(4):
        weight = float(logprobs[token].detach().exp())
        ref_logprob = torch.tensor([[math.log(reference[token])]])
        at_token = kl_loss(logprobs[token].view(1, 1), ref_logprob, masks(1), weight * one, estimator=estimator)
        at_token.backward(retain_graph=True)
    np.testing.assert_allclose(leaf.grad.numpy(), expected, atol=1e-7)
    assert estimator == "k1" or np.abs(expected).max() > 0.05


def test_the_kl_loss_is_weighted_and_blind_to_the_padding():
    """k2 of differences 1, -2 and 3: 0.5, 2 and 4.5."""
    logprobs, ref_logprobs = floats([-1, -3, NAN], [-1, NAN, NAN]), floats([-2, -1, 5], [-4, 7, NAN])
    weights = floats([0.5, 0.25, 0], [0.1, 0, 0])
    loss = kl_loss(logprobs, ref_logprobs, masks(2, 1).new_tensor([[1, 1, 0], [1, 0, 0]]), weights, estimator="k2")
    assert loss.item() == pytest.approx(0.5 * 0.5 + 2 * 0.25 + 4.5 * 0.1)


def test_the_entropy_bonus_lowers_the_loss_where_entropy_is_high():
    loss = entropy_bonus(floats([1.0, 2.0], [3.0, NAN]), masks(2, 1), floats([0.5, 0.25], [0.1, 0]))
    assert loss.item() == pytest.approx(-(0.5 + 0.5 + 0.3))


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
    both = selected_logprobs_and_entropy(logits, torch.tensor([[0, 1]]), temperature=temperature)
    assert torch.equal(both[0], logprobs) and both[1].flatten().tolist() == pytest.approx([expected] * 2, abs=1e-6)


@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_selected_logprobs_in_many_pieces(dtype, atol):
    """More logits than one piece holds, in [B, K, V]; values and gradient against torch's own log-softmax in float64."""
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(3, 50, 4096, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()
    ids = torch.randint(4096, (3, 50), generator=generator)
    weights = torch.randn(3, 50, generator=generator, dtype=torch.float64)
    found = selected_logprobs(logits, ids, temperature=0.7)
    assert found.shape == ids.shape and found.dtype == torch.promote_types(dtype, torch.float32)
    (found * weights).sum().backward()
    exact = logits.detach().double().requires_grad_()
    expected = (exact / 0.7).log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
    (expected * weights).sum().backward()
    torch.testing.assert_close(found.double(), expected, atol=max(atol / 100, 1e-12), rtol=1e-5)
    assert logits.grad.dtype == dtype
    torch.testing.assert_close(logits.grad.double(), exact.grad, atol=atol, rtol=0)
    probs = (exact.detach() / 0.7).softmax(-1)
    plain = -(probs * probs.log()).sum(-1)
    torch.testing.assert_close(entropy(logits, temperature=0.7).double(), plain, atol=1e-4, rtol=1e-4)
    both = selected_logprobs_and_entropy(logits, ids, temperature=0.7)
    assert torch.equal(both[0], found) and not both[1].requires_grad
    torch.testing.assert_close(both[1].double(), plain, atol=1e-4, rtol=1e-4)
    (gradient,) = torch.autograd.grad((both[0] * weights).sum(), logits)
    assert torch.equal(gradient, logits.grad)


def test_selected_logprobs_are_float32_and_hold_for_large_logits():
    logits = torch.tensor([[[1000.0, 0.0, -1000.0]]], dtype=torch.bfloat16)
    logprobs = selected_logprobs(logits, torch.tensor([[1]]), temperature=1.0)
    assert logprobs.dtype == torch.float32 and float(logprobs) == -1000.0
    assert float(entropy(logits, temperature=1.0)) == 0.0
    assert float(selected_logprobs_and_entropy(logits, torch.tensor([[1]]), temperature=1.0)[1]) == 0.0


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


# -- all together -----------------------------------------------------------------------------------------------------


CONFIG = AdvantageConfig(
    advantage=ADVANTAGES["gae"], group_size=1, kl_in_reward=True, kl_estimator="k1", gamma=1.0, gae_lambda=0.5,
    score_clip=None, missing_eos_penalty=1.0,
        missing_eos_score=None, overlong_buffer=0, max_new_tokens=3, whiten_rewards=False, whiten_advantages=False,
)  # fmt: skip


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
