"""Means and whitening over the tokens that count (mask True).   B rollouts, T response tokens."""

from __future__ import annotations

import torch

from rlhf_ray.algorithms.finite_values import BadNumber


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of values [B, T] over the True entries of mask [B, T]; a scalar."""
    return torch.where(mask, values, 0.0).sum() / mask.sum()


def masked_whiten(values: torch.Tensor, mask: torch.Tensor, *, shift_mean: bool) -> torch.Tensor:
    """Scale values [B, T] to unit deviation over mask; zero outside it.

    shift_mean=True centres them; False keeps the mean (for rewards, whose sign matters). The variance is the biased one
    of tf.nn.moments, as in OpenAI's lm-human-preferences; torch's default divides by n - 1.

    BadNumber where the variance overflows: all whitened values would be 0, silently.
    """
    mean = masked_mean(values, mask)
    variance = masked_mean((values - mean) ** 2, mask)
    if not bool(torch.isfinite(variance)):
        largest = torch.where(mask, values, 0.0).abs().amax(1)
        raise BadNumber(f"the variance of a batch with {float(largest.max()):g} in it is {float(variance)}", int(largest.argmax()))
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    if not shift_mean:
        whitened = whitened + mean
    return torch.where(mask, whitened, 0.0)
