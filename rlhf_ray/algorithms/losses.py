"""What an update minimises: PPO's two losses (Schulman et al. 2017, arXiv 1707.06347), a KL loss, an entropy bonus.

b rollouts of a microbatch, T response tokens. The losses of the policy are sums over tokens with `weights`
(`token_weights`), which count the whole minibatch over all ranks; the value loss and every statistic divide by `num_tokens`,
the minibatch's action tokens. Either way the sum over microbatches and ranks does not depend on how the minibatch was split.
"""

from __future__ import annotations

from typing import Literal

import torch

from rlhf_ray.algorithms.kl import KL_ESTIMATORS, kl_k3

Stats = dict[str, torch.Tensor]
Aggregation = Literal["token", "sequence_sum", "sequence_mean", "constant"]


def token_weights(
    action_mask: torch.Tensor,  # [b, T] bool
    aggregation: Aggregation,
    *,
    num_tokens: int,
    num_sequences: int,
    max_new_tokens: int,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """How much each token's loss counts, [b, T], zero outside the mask. Counts are those of the whole minibatch.

    token: mean over all tokens (PPO, DAPO). sequence_sum: mean over sequences of their sums (REINFORCE as derived).
    sequence_mean: mean over sequences of their means (GRPO), which favours short correct and long incorrect answers.
    constant: sums divided by num_sequences * max_new_tokens (Dr. GRPO), sequence_sum at the scale of a mean over tokens.
    """
    mask = action_mask.to(dtype)
    if aggregation == "token":
        return mask / num_tokens
    if aggregation == "sequence_sum":
        return mask / num_sequences
    if aggregation == "sequence_mean":
        return mask / (num_sequences * mask.sum(1, keepdim=True))
    assert aggregation == "constant", aggregation
    return mask / (num_sequences * max_new_tokens)


def policy_loss(
    logprobs: torch.Tensor,  # [b, T], with gradient
    old_logprobs: torch.Tensor,  # [b, T]
    advantages: torch.Tensor,  # [b, T]
    action_mask: torch.Tensor,  # [b, T] bool
    weights: torch.Tensor,  # [b, T], zero outside the mask
    *,
    clip_range: float,
    clip_range_high: float,
    dual_clip: float | None,
    num_tokens: int,
) -> tuple[torch.Tensor, Stats]:
    """max(-A ratio, -A clip(ratio, 1 - clip_range, 1 + clip_range_high)), weighted and summed.

    A clip_range_high above clip_range is DAPO's clip-higher: unlikely tokens may grow faster. With dual_clip c > 1
    (Ye et al. 2020, arXiv 1912.09729) the loss of a token with negative advantage is at most -A c, and beyond it the
    gradient is zero, where PPO's would grow with the ratio without bound.

    approx_kl is Schulman's k3 estimator of KL(old || new), which is zero at ratio 1 and never negative.
    """
    # Outside the mask both log-probs are meaningless; equal ones keep exp() finite and the gradient zero.
    log_ratio = torch.where(action_mask, logprobs - old_logprobs, 0.0)
    advantages = torch.where(action_mask, advantages, 0.0)
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - clip_range, 1.0 + clip_range_high)
    per_token = torch.maximum(unclipped, clipped)
    if dual_clip is not None:
        per_token = torch.where(advantages < 0, torch.minimum(per_token, -advantages * dual_clip), per_token)
    loss = (per_token * weights).sum()
    with torch.no_grad():
        stats = {
            "policy/loss": loss.detach(),
            "policy/approx_kl": kl_k3(torch.zeros_like(log_ratio), log_ratio).sum() / num_tokens,
            "policy/clip_frac": ((clipped > unclipped) & action_mask).sum() / num_tokens,
            "policy/ratio": torch.where(action_mask, ratio, 0.0).sum() / num_tokens,
        }
    return loss, stats


def kl_loss(
    logprobs: torch.Tensor,  # [b, T], with gradient
    ref_logprobs: torch.Tensor,  # [b, T]
    action_mask: torch.Tensor,  # [b, T] bool
    weights: torch.Tensor,  # [b, T], zero outside the mask
    *,
    estimator: Literal["k1", "k2", "k3"],
) -> torch.Tensor:
    """The KL of the policy relative to the reference as a loss: the estimator, weighted and summed.

    On samples of the policy itself the expected gradient of k2 is the KL's; that of k1 is zero whatever the policy
    (the expectation of a score function); that of k3 is the gradient of the other direction, KL(reference || policy).
    """
    log_ratio = torch.where(action_mask, logprobs - ref_logprobs, 0.0)
    return (KL_ESTIMATORS[estimator](log_ratio, torch.zeros_like(log_ratio)) * weights).sum()


def entropy_bonus(entropies: torch.Tensor, action_mask: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Minus the weighted sum of entropies [b, T] (with gradient): adding it to a loss raises the entropy."""
    return -(torch.where(action_mask, entropies, 0.0) * weights).sum()


def value_loss(
    values: torch.Tensor,  # [b, T], with gradient
    old_values: torch.Tensor,  # [b, T]
    returns: torch.Tensor,  # [b, T]
    action_mask: torch.Tensor,  # [b, T] bool
    *,
    value_clip_range: float,
    num_tokens: int,
) -> tuple[torch.Tensor, Stats]:
    """0.5 max((V - R)^2, (clip(V, V_old - e, V_old + e) - R)^2), summed over the mask and divided by num_tokens."""
    clipped_values = old_values + (values - old_values).clamp(-value_clip_range, value_clip_range)
    # Masked before squaring: the square's gradient would pass on a NaN or infinity that stands in the padding.
    unclipped = torch.where(action_mask, values - returns, 0.0) ** 2
    clipped = torch.where(action_mask, clipped_values - returns, 0.0) ** 2
    loss = 0.5 * torch.maximum(unclipped, clipped).sum() / num_tokens
    with torch.no_grad():
        stats = {
            "value/loss": loss.detach(),
            "value/clip_frac": (clipped > unclipped).sum() / num_tokens,
        }
    return loss, stats


def explained_variance(old_values: torch.Tensor, returns: torch.Tensor, action_mask: torch.Tensor) -> float:
    """1 - Var(R - V) / Var(R) over the mask; 0 when the returns don't vary."""
    targets, errors = returns[action_mask], (returns - old_values)[action_mask]
    variance = targets.var(unbiased=False)
    return float(1.0 - errors.var(unbiased=False) / variance) if variance > 0 else 0.0
