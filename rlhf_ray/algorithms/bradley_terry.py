"""Scores of versions from comparisons of two at a time (Zermelo 1929; Bradley and Terry 1952).   V versions, R resamples.

P(i beats j) = sigmoid(score_i - score_j). wins[i, j] counts how often i was preferred to j; a tie is half a win for each.
"""

from __future__ import annotations

from typing import Any, cast

import torch

STEPS = 100
LONGEST_STEP = 2.0  # of a score: Newton's method may overshoot where one version nearly always wins


def bradley_terry(wins: torch.Tensor, *, prior: float = 0.0) -> torch.Tensor:
    """The most likely scores of wins [..., V, V], whose mean is 0: float64 [..., V].

    prior: ties of each version with one more version, which has the score 0. With 0 a version that won or lost all its
    comparisons has no finite score, nor have versions that no chain of comparisons connects: their scores are NaN.
    """
    wins = wins.to(torch.float64)
    versions = wins.shape[-1]
    off_diagonal = 1 - torch.eye(versions, dtype=torch.float64)
    wins = wins * off_diagonal
    games = wins + wins.transpose(-1, -2)  # [..., V, V]
    won = wins.sum(-1) + prior / 2  # [..., V]
    scores, step = torch.zeros_like(won), torch.zeros_like(won)
    # Without a prior the likelihood is flat along (1, ..., 1); a curvature there leaves the mean where it is, at 0.
    flat = torch.ones(versions, versions, dtype=torch.float64) / versions if prior == 0 else 0.0
    for _ in range(STEPS):
        share = torch.sigmoid(scores.unsqueeze(-1) - scores.unsqueeze(-2))  # [..., V, V]
        alone = torch.sigmoid(scores)
        gradient = won - (games * share).sum(-1) - prior * alone
        weights = games * share * (1 - share)
        curvature = torch.diag_embed(weights.sum(-1) + prior * alone * (1 - alone)) - weights + flat
        step = _solved(curvature, gradient)
        scores = scores + step.clamp(-LONGEST_STEP, LONGEST_STEP)
        if bool((step.abs() < 1e-10).logical_or(step.isnan()).all()):
            break
    scores = torch.where((step.abs() < 1e-6).all(-1, keepdim=True), scores, torch.nan)  # what grows for ever has no end
    return scores - scores.mean(-1, keepdim=True)


def _solved(matrix: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """x of matrix [..., V, V] x = vector [..., V]; NaN where the matrix is singular."""
    found: Any = cast(Any, torch.linalg).solve_ex(matrix, vector.unsqueeze(-1))  # torch names no types of it
    solution, failed = cast(tuple[torch.Tensor, torch.Tensor], (found.result, found.info))
    return torch.where(failed[..., None] == 0, solution.squeeze(-1), torch.nan)


def connected(wins: torch.Tensor) -> list[list[int]]:
    """The versions of wins [V, V] in groups, by comparisons between them: scores compare within a group only."""
    games = (wins + wins.T) > 0
    left, groups = set(range(len(wins))), list[list[int]]()
    while left:
        group, reached = set[int](), {min(left)}
        while reached:
            version = reached.pop()
            group.add(version)
            reached |= {other for other in left - group if bool(games[version, other])}
        groups.append(sorted(group))
        left -= group
    return groups
