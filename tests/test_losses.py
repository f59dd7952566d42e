"""Losses and log-probs on numbers worked out by hand, by plain loops, and by differences."""

import math

import numpy as np
import pytest
import torch
from masks import NAN, floats, losses, masks, ragged

from rlhf_ray.algorithms.logprobs import selected_logprobs, selected_logprobs_and_entropy
from rlhf_ray.algorithms.losses import (
    entropy_bonus,
    explained_variance,
    kl_loss,
    token_weights,
    value_loss,
)


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


@pytest.mark.parametrize("temperature, first", [(1.0, 1 / 4), (0.5, 1 / 10), (2.0, 1 / (1 + math.sqrt(3)))])
def test_selected_logprobs_and_entropy_of_two_tokens(temperature, first):
    logits = floats([0, math.log(3)], [0, math.log(3)])[None]
    logprobs = selected_logprobs(logits, torch.tensor([[0, 1]]), temperature=temperature)
    assert logprobs.exp().flatten().tolist() == pytest.approx([first, 1 - first], abs=1e-6)
    expected = -first * math.log(first) - (1 - first) * math.log(1 - first)
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
    both = selected_logprobs_and_entropy(logits, ids, temperature=0.7)
    assert torch.equal(both[0], found) and not both[1].requires_grad
    torch.testing.assert_close(both[1].double(), plain, atol=1e-4, rtol=1e-4)
    (gradient,) = torch.autograd.grad((both[0] * weights).sum(), logits)
    assert torch.equal(gradient, logits.grad)


def test_selected_logprobs_are_float32_and_hold_for_large_logits():
    logits = torch.tensor([[[1000.0, 0.0, -1000.0]]], dtype=torch.bfloat16)
    logprobs = selected_logprobs(logits, torch.tensor([[1]]), temperature=1.0)
    assert logprobs.dtype == torch.float32 and float(logprobs) == -1000.0
    assert float(selected_logprobs_and_entropy(logits, torch.tensor([[1]]), temperature=1.0)[1]) == 0.0
