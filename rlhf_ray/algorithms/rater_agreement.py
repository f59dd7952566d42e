"""How far raters agree, beyond what chance would give.   C categories, U things that were rated, R resamples.

1 is perfect agreement, 0 is what chance gives. NaN where there is nothing to measure: no thing with two ratings, or a
single category in all of them.
"""

from __future__ import annotations

import torch


def cohen_kappa(table: torch.Tensor) -> float:
    """Cohen's kappa (1960) of two raters: table[i, j] counts the things that one called i and the other j, [C, C]."""
    shares = table.to(torch.float64) / table.sum()
    by_chance = float(shares.sum(0) @ shares.sum(1))
    return (float(shares.diagonal().sum()) - by_chance) / (1 - by_chance) if by_chance < 1 else float("nan")


def krippendorff_alpha(counts: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Krippendorff's alpha for categories without an order; not every rater has to rate everything: float64 [] or [R].

    counts: how many raters put each thing into each category, [U, C]; things with one rating don't count
    weights: how often each resample holds each thing, [R, U]; None: the things as they are
    """
    counts = counts.to(torch.float64)
    ratings = counts.sum(1)  # [U]
    counts, paired = counts[ratings >= 2], ratings >= 2
    ratings = ratings[paired]
    weights = (
        torch.ones(len(counts), dtype=torch.float64) if weights is None else weights.to(torch.float64)[..., paired]
    )
    differing = (ratings**2 - (counts**2).sum(1)) / (
        ratings - 1
    )  # pairs of unlike ratings, weighed as the coincidence matrix does
    totals = weights @ counts  # [..., C]
    all_ratings = totals.sum(-1)
    by_chance = (all_ratings**2 - (totals**2).sum(-1)) / (all_ratings - 1)
    return 1 - torch.where(by_chance > 0, (weights @ differing) / by_chance, torch.nan)
