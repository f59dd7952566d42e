"""PPO's two losses (Schulman et al. 2017, arXiv 1707.06347).   b rollouts of a microbatch, T response tokens.

Each divides by `num_tokens`, the action tokens of the whole minibatch over all ranks, so that the sum over microbatches
and ranks does not depend on how the minibatch was split. Statistics are sums; whoever splits divides them likewise.
"""

from __future__ import annotations

import torch

from rlhf_ray.algorithms.kl import kl_k3

Stats = dict[str, torch.Tensor]


def policy_loss(
    logprobs: torch.Tensor,  # [b, T], with gradient
    old_logprobs: torch.Tensor,  # [b, T]
    advantages: torch.Tensor,  # [b, T]
    action_mask: torch.Tensor,  # [b, T] bool
    *,
    clip_range: float,
    num_tokens: int,
) -> tuple[torch.Tensor, Stats]:
    """max(-A ratio, -A clip(ratio, 1 - e, 1 + e)), summed over the mask and divided by num_tokens.

    approx_kl is Schulman's k3 estimator of KL(old || new), which is zero at ratio 1 and never negative.
    """
    # Outside the mask both log-probs are meaningless; equal ones keep exp() finite and the gradient zero.
    log_ratio = torch.where(action_mask, logprobs - old_logprobs, 0.0)
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - clip_range, 1.0 + clip_range)
    per_token = torch.where(action_mask, torch.maximum(unclipped, clipped), 0.0)
    loss = per_token.sum() / num_tokens
    with torch.no_grad():
        stats = {
            "policy/loss": loss.detach(),
            "policy/approx_kl": kl_k3(torch.zeros_like(log_ratio), log_ratio).sum() / num_tokens,
            "policy/clip_frac": ((clipped > unclipped) & action_mask).sum() / num_tokens,
            "policy/ratio": torch.where(action_mask, ratio, 0.0).sum() / num_tokens,
        }
    return loss, stats


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
