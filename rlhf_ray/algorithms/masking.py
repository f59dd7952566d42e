"""Means and whitening over the tokens that count (mask True).   B rollouts, T response tokens."""

from __future__ import annotations

import torch


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of values [B, T] over the True entries of mask [B, T]; a scalar."""
    return torch.where(mask, values, 0.0).sum() / mask.sum()


def masked_whiten(values: torch.Tensor, mask: torch.Tensor, *, shift_mean: bool) -> torch.Tensor:
    """Scale values [B, T] to unit deviation over mask; zero outside it.

    shift_mean=True centres them; False keeps the mean (for rewards, whose sign matters). The variance is the biased one
    of tf.nn.moments, as in OpenAI's lm-human-preferences; torch's default divides by n - 1.
    """
    mean = masked_mean(values, mask)
    variance = masked_mean((values - mean) ** 2, mask)
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    if not shift_mean:
        whitened = whitened + mean
    return torch.where(mask, whitened, 0.0)
