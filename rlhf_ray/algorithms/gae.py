"""Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438).   B rollouts, T response tokens."""

from __future__ import annotations

import torch


def gae(
    rewards: torch.Tensor,  # [B, T]
    old_values: torch.Tensor,  # [B, T], value of the state before token t
    action_mask: torch.Tensor,  # [B, T] bool, True from the left
    *,
    gamma: float,
    gae_lambda: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages and returns, both [B, T], zero outside the mask.

    delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lambda A_{t+1};  return_t = A_t + V_t.
    The state after the last action token is terminal, so what stands in the padding can't leak in.
    """
    rewards = torch.where(action_mask, rewards, 0.0)
    values = torch.where(action_mask, old_values, 0.0)
    advantages = torch.zeros_like(values)
    next_value = torch.zeros_like(values[:, 0])
    next_advantage = torch.zeros_like(next_value)
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = torch.where(action_mask[:, t], delta + gamma * gae_lambda * next_advantage, 0.0)
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return advantages, torch.where(action_mask, advantages + values, 0.0)
