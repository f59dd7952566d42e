"""KL of the policy relative to the reference: estimators per token, and the coefficient's controllers."""

from __future__ import annotations

import torch


def kl_k1(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """log p - log p_ref per token [B, T]: unbiased under the policy's own samples, can be negative."""
    return logprobs - ref_logprobs


def kl_k2(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """k1^2 / 2 per token [B, T]: biased as an estimate, but its gradient is an unbiased estimate of the KL's."""
    return 0.5 * (logprobs - ref_logprobs) ** 2


def kl_k3(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """exp(-k1) - 1 + k1 per token [B, T]: unbiased too, never negative (joschu.net/blog/kl-approx.html)."""
    log_ratio = ref_logprobs - logprobs
    return torch.expm1(log_ratio) - log_ratio


KL_ESTIMATORS = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}


def adapt_kl_coef(kl_coef: float, kl: float, *, target: float, horizon: int, episodes: int) -> float:
    """The next KL coefficient of the proportional controller of Ziegler et al. 2019 (arXiv 1909.08593, section 2.2).

    kl and target are nats per *sequence* (summed over tokens, mean over the batch); horizon and episodes count sequences.
    A horizon of a fifth of the episodes or less would let the coefficient become 0 or negative.
    """
    assert episodes < 5 * horizon, "the recipe's validation has refused such a horizon"
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return kl_coef * (1.0 + error * episodes / horizon)
