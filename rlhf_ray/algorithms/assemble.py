"""From scores and log-probs to what PPO trains on: rewards, whitening, GAE.   B rollouts, T response tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rlhf_ray.algorithms.gae import gae
from rlhf_ray.algorithms.kl import kl_k1
from rlhf_ray.algorithms.losses import explained_variance
from rlhf_ray.algorithms.masking import masked_mean, masked_whiten
from rlhf_ray.algorithms.rewards import token_rewards


@dataclass(frozen=True, slots=True, kw_only=True)
class Assembled:
    """Targets of one update, and what happened in the rollout."""

    advantages: torch.Tensor  # [B, T], zero outside the mask
    returns: torch.Tensor  # [B, T], zero outside the mask
    stats: dict[str, float]


def assemble(
    scores: torch.Tensor,  # [B], before KL
    ended: torch.Tensor,  # [B] bool
    rollout_logprobs: torch.Tensor,  # [B, T], as the generator drew them
    old_logprobs: torch.Tensor,  # [B, T], as the policy recomputes them
    ref_logprobs: torch.Tensor,  # [B, T]
    old_values: torch.Tensor,  # [B, T]
    action_mask: torch.Tensor,  # [B, T] bool
    *,
    kl_coef: float,
    gamma: float,
    gae_lambda: float,
    missing_eos_penalty: float,
    whiten_rewards: bool,
    whiten_advantages: bool,
) -> Assembled:
    """Advantages, returns and the step's `objective/*` statistics. Whitening is over the whole batch."""
    kl = torch.where(action_mask, kl_k1(old_logprobs, ref_logprobs), 0.0)
    penalised = scores - missing_eos_penalty * (~ended).to(scores.dtype)
    rewards = token_rewards(penalised, kl, action_mask, kl_coef=kl_coef)
    rlhf_reward = rewards.sum(1).mean()
    if whiten_rewards:
        rewards = masked_whiten(rewards, action_mask, shift_mean=False)
    advantages, returns = gae(rewards, old_values, action_mask, gamma=gamma, gae_lambda=gae_lambda)
    stats = {
        "objective/score": float(scores.mean()),
        "objective/score_std": float(scores.std(unbiased=False)),
        "objective/kl": float(kl.sum(1).mean()),
        "objective/rlhf_reward": float(rlhf_reward),
        "objective/kl_coef": kl_coef,
        "objective/response_length": float(action_mask.sum(1).float().mean()),
        "objective/eos_rate": float(ended.float().mean()),
        "value/explained_variance": explained_variance(old_values, returns, action_mask),
        "value/returns": float(masked_mean(returns, action_mask)),
        "policy/advantage_std": float(advantages[action_mask].std(unbiased=False)),
        "policy/mismatch_max": float((rollout_logprobs - old_logprobs)[action_mask].abs().max()),
        "policy/mismatch_kl": float(masked_mean(rollout_logprobs - old_logprobs, action_mask)),
    }
    if whiten_advantages:
        advantages = masked_whiten(advantages, action_mask, shift_mean=True)
    return Assembled(advantages=advantages, returns=returns, stats=stats)
