"""From scores and log-probs to what an update trains on: rewards, whitening, advantages.   B rollouts, T response tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from rlhf_ray.algorithms.advantage_estimators import AdvantageEntry, AdvantageOptions
from rlhf_ray.algorithms.finite_values import check_finite
from rlhf_ray.algorithms.kl import KL_ESTIMATORS, kl_k1
from rlhf_ray.algorithms.losses import explained_variance
from rlhf_ray.algorithms.masking import masked_mean, masked_whiten
from rlhf_ray.algorithms.off_policy import mismatch
from rlhf_ray.algorithms.scores import (
    end_scores,
    length_correlation,
    overlong_penalty,
    token_rewards,
    zero_variance_groups,
)


class WrongEstimate(ValueError):
    """An estimator returned what can't be trained on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdvantageConfig:
    """The recipe's options for rewards and advantages."""

    advantage: AdvantageEntry
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
    """Advantages, returns and the step's `objective/*` statistics. Whitening is over the whole batch.

    BadNumber for what is not finite: NaN in one row would make every row NaN by whitening, and then every weight.
    """
    check_finite("a score", scores)
    for whose, given in (("generator", rollout_logprobs), ("policy", old_logprobs), ("reference", ref_logprobs)):
        check_finite(f"a log-prob under the {whose}", given, action_mask)
    if old_values is not None:
        check_finite("a value of the critic", old_values, action_mask)
    advantage = config.advantage
    kl = torch.where(action_mask, kl_k1(old_logprobs, ref_logprobs), 0.0)
    penalised = penalise(scores, ended, action_mask, config)
    baseline = advantage.score_baseline  # None: scores as they are, as for PPO
    compared = penalised if baseline is None else baseline(penalised, group_size=config.group_size)
    estimated_kl = kl  # counts nothing where the KL is in the loss, whose estimator may overflow
    if config.kl_in_reward:
        estimated_kl = torch.where(action_mask, KL_ESTIMATORS[config.kl_estimator](old_logprobs, ref_logprobs), 0.0)
    rewards = token_rewards(compared, estimated_kl, action_mask, kl_coef=kl_coef if config.kl_in_reward else 0.0)
    stats = {
        "objective/score": float(scores.mean()),
        "objective/score_std": float(scores.std(unbiased=False)),
        "objective/score_length_corr": length_correlation(scores, action_mask.sum(1)),
        "objective/kl": float(kl.sum(1).mean()),
        "objective/rlhf_reward": float((penalised - kl_coef * kl.sum(1)).mean()),
        "objective/kl_coef": kl_coef,
        "objective/response_length": float(action_mask.sum(1).float().mean()),
        "objective/eos_rate": float(ended.float().mean()),
    } | mismatch(old_logprobs, rollout_logprobs, action_mask)
    if config.group_size > 1:
        equal = zero_variance_groups(penalised, group_size=config.group_size)
        stats["objective/zero_variance_groups"] = float(equal.float().mean())
    check_finite("a reward less its KL penalty", rewards)
    if config.whiten_rewards:
        rewards = masked_whiten(rewards, action_mask, shift_mean=False)
    advantages, returns = _estimated(advantage, rewards, old_values, action_mask, config)
    check_finite("an advantage", advantages)
    if returns is not None:
        check_finite("a return", returns)
    if old_values is not None and returns is not None:
        stats |= {
            "value/explained_variance": explained_variance(old_values, returns, action_mask),
            "value/returns": float(masked_mean(returns, action_mask)),
        }
    stats["policy/advantage_std"] = float(advantages[action_mask].std(unbiased=False))
    if config.whiten_advantages:
        advantages = masked_whiten(advantages, action_mask, shift_mean=True)
    return Assembled(advantages=advantages, returns=returns, stats=stats)


def penalise(
    scores: torch.Tensor, ended: torch.Tensor, action_mask: torch.Tensor, config: AdvantageConfig
) -> torch.Tensor:
    """Scores [B] less the penalties of responses that did not end or are too long."""
    penalised = end_scores(
        scores, ended, clip=config.score_clip, penalty=config.missing_eos_penalty, replacement=config.missing_eos_score
    )
    if config.overlong_buffer == 0:
        return penalised
    lengths = action_mask.sum(1).to(scores.dtype)
    return penalised - overlong_penalty(lengths, longest=config.max_new_tokens, buffer=config.overlong_buffer)


def _estimated(
    advantage: AdvantageEntry,
    rewards: torch.Tensor,
    values: torch.Tensor | None,
    action_mask: torch.Tensor,
    config: AdvantageConfig,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(advantages, returns), zero outside the mask, whoever wrote the estimator. WrongEstimate for other shapes than [B, T]."""
    options = AdvantageOptions(group_size=config.group_size, gamma=config.gamma, gae_lambda=config.gae_lambda)
    advantages, returns = advantage.estimator(rewards, values, action_mask, options)
    for what, given in (("advantages", advantages), ("returns", returns)):
        if given is None and advantage.needs_critic:
            raise WrongEstimate(f"ppo.advantage {advantage.name} gave no {what}, from which its critic would learn")
        if given is not None and given.shape != action_mask.shape:
            raise WrongEstimate(
                f"ppo.advantage {advantage.name} gave {what} of shape {tuple(given.shape)} for rewards of shape "
                f"{tuple(action_mask.shape)}; give one number per token"
            )
    outside = ~action_mask
    return advantages.masked_fill(outside, 0.0), None if returns is None else returns.masked_fill(outside, 0.0)
