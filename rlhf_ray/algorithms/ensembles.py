"""One score from those of several reward models, and how far they are apart.   M members, B responses."""

from __future__ import annotations

from typing import Literal

import torch

Combine = Literal["mean", "worst", "mean_minus_std"]


def combine_scores(scores: torch.Tensor, *, combine: Combine, std: float) -> torch.Tensor:
    """Normalised scores of the members [M, B] -> one score for each response [B].

    mean             the members' average
    worst            their lowest: worst-case optimisation (Coste et al. 2023, arXiv 2310.02743)
    mean_minus_std   mean - std * deviation (Eisenstein et al. 2023, arXiv 2312.09244; the uncertainty-weighted
                     score of Coste et al. subtracts the variance in its place)
    """
    if combine == "worst":
        return scores.min(0).values
    mean = scores.mean(0)
    return mean if combine == "mean" else mean - std * disagreement(scores)


def disagreement(scores: torch.Tensor) -> torch.Tensor:
    """Deviation of the members' scores [M, B] for each response, dividing by M: [B]; 0 for one member."""
    return scores.std(0, unbiased=False)
