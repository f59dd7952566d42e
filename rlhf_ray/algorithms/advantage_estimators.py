"""Advantages: from the rewards of a batch to which tokens were better than expected. `tables.advantages` names them.

B rollouts, T response tokens. The samples of a prompt are a group of `group_size` rows side by side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from rlhf_ray.algorithms.gae import gae

STD_EPS = 1e-4  # TRL's; a group whose rewards are all equal gets advantages of zero, not of noise


@dataclass(frozen=True, slots=True, kw_only=True)
class AdvantageOptions:
    """The recipe's options for every estimator."""

    group_size: int  # samples per prompt: their rows are side by side
    gamma: float
    gae_lambda: float


class Estimator(Protocol):
    """(advantages, returns), both [B, T]. The returns are what a critic learns; None where there is none."""

    def __call__(
        self,
        rewards: torch.Tensor,  # [B, T]: the score on the last token, less the KL where it is in the reward
        values: torch.Tensor | None,  # [B, T], of the state before each token; None without a critic
        action_mask: torch.Tensor,  # [B, T] bool: what is outside counts for nothing
        options: AdvantageOptions,
        /,
    ) -> tuple[torch.Tensor, torch.Tensor | None]: ...


class ScoreBaseline(Protocol):
    def __call__(self, scores: torch.Tensor, /, *, group_size: int) -> torch.Tensor: ...  # [B] -> [B]


class AdvantageEntry(Protocol):
    """What `experience.assemble` needs of an entry of `tables.advantages`."""

    @property
    def name(self) -> str: ...
    @property
    def needs_critic(self) -> bool: ...
    @property
    def estimator(self) -> Estimator: ...
    @property
    def score_baseline(self) -> ScoreBaseline | None: ...


def leave_one_out(rewards: torch.Tensor, *, group_size: int) -> torch.Tensor:
    """RLOO (Ahmadian et al. 2024, arXiv 2402.14740): r_i minus the mean of the others of its group.   [B] -> [B]

    An unbiased baseline: it does not depend on the response it is subtracted from.
    """
    grouped = rewards.view(-1, group_size)
    others = (grouped.sum(1, keepdim=True) - grouped) / (group_size - 1)
    return (grouped - others).flatten()


def group_centred(rewards: torch.Tensor, *, group_size: int) -> torch.Tensor:
    """Dr. GRPO (Liu et al. 2025, arXiv 2503.20783): r_i minus its group's mean, (n - 1) / n of RLOO's.   [B] -> [B]"""
    grouped = rewards.view(-1, group_size)
    return (grouped - grouped.mean(1, keepdim=True)).flatten()


def group_standardised(rewards: torch.Tensor, *, group_size: int) -> torch.Tensor:
    """GRPO (Shao et al. 2024, arXiv 2402.03300): (r_i - mean) / (deviation + 1e-4) of its group.   [B] -> [B]

    The deviation divides by n - 1, as in TRL and verl; the paper does not say.
    """
    grouped = rewards.view(-1, group_size)
    deviation = grouped.std(1, keepdim=True, unbiased=True)
    return ((grouped - grouped.mean(1, keepdim=True)) / (deviation + STD_EPS)).flatten()


def rewards_to_go(rewards: torch.Tensor, action_mask: torch.Tensor, *, gamma: float) -> torch.Tensor:
    """R_t = r_t + gamma R_{t+1}, zero outside the mask: GAE with lambda 1 and a critic that says 0.   [B, T] -> [B, T]"""
    return gae(rewards, torch.zeros_like(rewards), action_mask, gamma=gamma, gae_lambda=1.0)[0]


# -- the estimators: one signature (`Estimator`) -------------------------------------------------------


def with_critic(
    rewards: torch.Tensor, values: torch.Tensor | None, action_mask: torch.Tensor, options: AdvantageOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    assert values is not None, "there is a critic"
    return gae(rewards, values, action_mask, gamma=options.gamma, gae_lambda=options.gae_lambda)


def rloo(
    rewards: torch.Tensor, values: torch.Tensor | None, action_mask: torch.Tensor, options: AdvantageOptions
) -> tuple[torch.Tensor, None]:
    return _of_response(leave_one_out(rewards.sum(1), group_size=options.group_size), action_mask), None


def grpo(
    rewards: torch.Tensor, values: torch.Tensor | None, action_mask: torch.Tensor, options: AdvantageOptions
) -> tuple[torch.Tensor, None]:
    return _of_response(group_standardised(rewards.sum(1), group_size=options.group_size), action_mask), None


def dr_grpo(
    rewards: torch.Tensor, values: torch.Tensor | None, action_mask: torch.Tensor, options: AdvantageOptions
) -> tuple[torch.Tensor, None]:
    return _of_response(group_centred(rewards.sum(1), group_size=options.group_size), action_mask), None


def reinforce_pp(
    rewards: torch.Tensor, values: torch.Tensor | None, action_mask: torch.Tensor, options: AdvantageOptions
) -> tuple[torch.Tensor, None]:
    """REINFORCE++ (Hu et al. 2025, arXiv 2501.03262)."""
    return rewards_to_go(rewards, action_mask, gamma=options.gamma), None


def _of_response(advantages: torch.Tensor, action_mask: torch.Tensor) -> torch.Tensor:
    """The same for every token of a response.   [B] -> [B, T]"""
    return torch.where(action_mask, advantages[:, None], 0.0)
