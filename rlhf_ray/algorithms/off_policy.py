"""Samples of an older policy: how much each of their tokens counts.   B rollouts, T response tokens."""

from __future__ import annotations

import math

import torch

from rlhf_ray.algorithms.kl import kl_k3
from rlhf_ray.algorithms.masking import masked_mean


def truncated_importance(
    old_logprobs: torch.Tensor,  # [B, T], of the policy at the start of the update
    rollout_logprobs: torch.Tensor,  # [B, T], of the policy that drew the token
    action_mask: torch.Tensor,  # [B, T] bool
    *,
    cap: float,
) -> torch.Tensor:
    """min(pi_old / pi_rollout, cap) of each token, [B, T], zero outside the mask.

    The truncation is IMPALA's (Espeholt et al. 2018, arXiv 1802.01561, section 4.1: rho = min(rho_bar, pi / mu)): no weight
    above the cap, so a bounded variance, for a bias towards the policy that drew.
    """
    log_ratio = torch.where(action_mask, old_logprobs - rollout_logprobs, 0.0)
    return torch.where(action_mask, log_ratio.exp().clamp(max=cap), 0.0)


def off_policy_stats(
    importance: torch.Tensor,  # [B, T], zero outside the mask
    old_logprobs: torch.Tensor,  # [B, T]
    rollout_logprobs: torch.Tensor,  # [B, T]
    ages: torch.Tensor,  # [B], policy versions between drawing and training
    action_mask: torch.Tensor,  # [B, T] bool
    *,
    cap: float,
) -> dict[str, float]:
    """How old the samples are and how far their policy is from the current one.

    The mismatch of generator and policy is that of the samples of age 0, where there are any: the others differ by design.
    """
    gaps = rollout_logprobs - old_logprobs
    stats = {
        "rollout/age_mean": float(ages.float().mean()),
        "rollout/age_max": float(ages.max()),
        "rollout/importance_mean": float(masked_mean(importance, action_mask)),
        "rollout/importance_capped_frac": float((importance >= cap)[action_mask].float().mean()),
        "rollout/off_policy_kl": float(
            masked_mean(gaps, action_mask)
        ),  # k1, of the old policy relative to the current one
    }
    return stats | mismatch(old_logprobs, rollout_logprobs, action_mask & (ages == 0)[:, None])


def mismatch(old_logprobs: torch.Tensor, rollout_logprobs: torch.Tensor, action_mask: torch.Tensor) -> dict[str, float]:
    """Generator against policy of the same weights; nothing where the mask is empty.

    policy/mismatch_p99 and _max: |difference of a token's log-probs|, the 99 % quantile (the next larger one that occurs) and the
    largest. policy/mismatch_kl: KL(generator || policy) in nats per token by k3, whose terms are not negative.
    """
    if not action_mask.any():
        return {}
    gaps = (rollout_logprobs - old_logprobs)[action_mask]
    sizes = gaps.abs()
    return {
        "policy/mismatch_p99": float(sizes.kthvalue(math.ceil(0.99 * len(sizes))).values),
        "policy/mismatch_max": float(sizes.max()),
        "policy/mismatch_kl": float(kl_k3(rollout_logprobs, old_logprobs)[action_mask].mean()),
    }
