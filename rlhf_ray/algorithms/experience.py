"""From scores and log-probs to what an update trains on: rewards, whitening, advantages.   B rollouts, T response tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from rlhf_ray.algorithms.advantages import group_centred, group_standardised, leave_one_out, rewards_to_go
from rlhf_ray.algorithms.gae import gae
from rlhf_ray.algorithms.kl import KL_ESTIMATORS, kl_k1
from rlhf_ray.algorithms.losses import explained_variance
from rlhf_ray.algorithms.masking import masked_mean, masked_whiten
from rlhf_ray.algorithms.scores import (
    end_scores,
    length_correlation,
    overlong_penalty,
    token_rewards,
    zero_variance_groups,
)

#: Advantages of whole responses from the rewards [B] of their group; every token of a response gets the same.
GROUP_ADVANTAGES = {"rloo": leave_one_out, "grpo": group_standardised, "dr_grpo": group_centred}
Advantage = Literal["gae", "rloo", "grpo", "dr_grpo", "reinforce_pp", "reinforce_pp_baseline"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdvantageConfig:
    """How the recipe wants rewards and advantages."""

    advantage: Advantage
    group_size: int  # samples of a prompt, side by side
    kl_in_reward: bool
    kl_estimator: Literal["k1", "k2", "k3"]  # of the KL in the reward
    gamma: float
    gae_lambda: float
    score_clip: float | None
    missing_eos_penalty: float
    missing_eos_score: float | None
    overlong_buffer: int  # tokens before max_new_tokens over which the penalty rises; 0: none
    max_new_tokens: int
    whiten_rewards: bool
    whiten_advantages: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Assembled:
    """Targets of one update, and what happened in the rollout."""

    advantages: torch.Tensor  # [B, T], zero outside the mask
    returns: torch.Tensor | None  # [B, T], zero outside the mask; None without a critic
    stats: dict[str, float]


def assemble(
    scores: torch.Tensor,  # [B], before KL
    ended: torch.Tensor,  # [B] bool
    rollout_logprobs: torch.Tensor,  # [B, T], as the generator drew them
    old_logprobs: torch.Tensor,  # [B, T], as the policy recomputes them
    ref_logprobs: torch.Tensor,  # [B, T]
    old_values: torch.Tensor | None,  # [B, T]; None without a critic
    action_mask: torch.Tensor,  # [B, T] bool
    config: AdvantageConfig,
    *,
    kl_coef: float,
) -> Assembled:
    """Advantages, returns and the step's `objective/*` statistics. Whitening is over the whole batch."""
    kl = torch.where(action_mask, kl_k1(old_logprobs, ref_logprobs), 0.0)
    penalised = end_scores(
        scores, ended, clip=config.score_clip, penalty=config.missing_eos_penalty, replacement=config.missing_eos_score
    )
    if config.overlong_buffer > 0:
        lengths = action_mask.sum(1).to(scores.dtype)
        penalised = penalised - overlong_penalty(lengths, longest=config.max_new_tokens, buffer=config.overlong_buffer)
    if config.advantage == "reinforce_pp_baseline":  # the group's mean goes first, the KL is added to what is left
        paid = group_centred(penalised, group_size=config.group_size)
    else:
        paid = penalised
    penalty = torch.where(action_mask, KL_ESTIMATORS[config.kl_estimator](old_logprobs, ref_logprobs), 0.0)
    rewards = token_rewards(paid, penalty, action_mask, kl_coef=kl_coef if config.kl_in_reward else 0.0)
    stats = {
        "objective/score": float(scores.mean()),
        "objective/score_std": float(scores.std(unbiased=False)),
        "objective/score_length_corr": length_correlation(scores, action_mask.sum(1)),
        "objective/kl": float(kl.sum(1).mean()),
        "objective/rlhf_reward": float((penalised - kl_coef * kl.sum(1)).mean()),
        "objective/kl_coef": kl_coef,
        "objective/response_length": float(action_mask.sum(1).float().mean()),
        "objective/eos_rate": float(ended.float().mean()),
        "policy/mismatch_max": float((rollout_logprobs - old_logprobs)[action_mask].abs().max()),
        "policy/mismatch_kl": float(masked_mean(rollout_logprobs - old_logprobs, action_mask)),
    }
    if config.group_size > 1:
        equal = zero_variance_groups(penalised, group_size=config.group_size)
        stats["objective/zero_variance_groups"] = float(equal.float().mean())
    if config.whiten_rewards:
        rewards = masked_whiten(rewards, action_mask, shift_mean=False)
    returns = None
    if config.advantage == "gae":
        advantages, returns = gae(rewards, old_values, action_mask, gamma=config.gamma, gae_lambda=config.gae_lambda)
        stats |= {
            "value/explained_variance": explained_variance(old_values, returns, action_mask),
            "value/returns": float(masked_mean(returns, action_mask)),
        }
    elif config.advantage in GROUP_ADVANTAGES:
        of_response = GROUP_ADVANTAGES[config.advantage](rewards.sum(1), group_size=config.group_size)
        advantages = torch.where(action_mask, of_response[:, None], 0.0)
    else:
        advantages = rewards_to_go(rewards, action_mask, gamma=config.gamma)
    stats["policy/advantage_std"] = float(advantages[action_mask].std(unbiased=False))
    if config.whiten_advantages:
        advantages = masked_whiten(advantages, action_mask, shift_mean=True)
    return Assembled(advantages=advantages, returns=returns, stats=stats)
