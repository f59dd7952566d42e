"""Turn a scored rollout into per-token rewards.   B rollouts, T response tokens."""

from __future__ import annotations

import torch


def last_action_index(action_mask: torch.Tensor) -> torch.Tensor:
    """Index [B] of each row's last True in action_mask [B, T], for masks that are True from the left."""
    return action_mask.sum(1) - 1


def end_scores(
    scores: torch.Tensor,  # [B]
    ended: torch.Tensor,  # [B] bool
    *,
    clip: float | None,
    penalty: float,
    replacement: float | None,
) -> torch.Tensor:
    """Scores [B] as they count: cut to +-clip, then those of responses that did not end lowered, or replaced.

    OpenAI's lm-human-preferences replaces them by -1, TRL lowers them.
    """
    if clip is not None:
        scores = scores.clamp(-clip, clip)
    unended = scores - penalty if replacement is None else torch.full_like(scores, replacement)
    return torch.where(ended, scores, unended)


def overlong_penalty(lengths: torch.Tensor, *, longest: int, buffer: int) -> torch.Tensor:
    """DAPO's soft punishment (Yu et al. 2025, arXiv 2503.14476, eq. 13), 0 to 1, to subtract from scores.   [B] -> [B]

    0 up to longest - buffer tokens, then rising linearly to 1 at `longest`.
    """
    return ((lengths - (longest - buffer)) / buffer).clamp(0.0, 1.0)


def zero_variance_groups(scores: torch.Tensor, *, group_size: int) -> torch.Tensor:
    """Whether all samples of a prompt score the same, so that none is better than the others.   [B] -> bool [groups]"""
    grouped = scores.view(-1, group_size)
    return (grouped == grouped[:, :1]).all(1)


def token_rewards(
    scores: torch.Tensor,  # [B]
    kl: torch.Tensor,  # [B, T]
    action_mask: torch.Tensor,  # [B, T] bool
    *,
    kl_coef: float,
) -> torch.Tensor:
    """Rewards [B, T]: -kl_coef * kl on every action token, and the score on the last one (EOS where there is one).

    The N+ implementation details (arXiv 2403.17031) and TRL place the score one position later, on the padding after EOS;
    here, as in OpenRLHF, it is on the token whose choice ended the response.
    """
    rewards = torch.where(action_mask, -kl_coef * kl, 0.0)
    return rewards.scatter_add(1, last_action_index(action_mask)[:, None], scores[:, None].to(rewards.dtype))


def length_correlation(scores: torch.Tensor, lengths: torch.Tensor) -> float:
    """Pearson correlation of scores [B] with lengths [B] in tokens; nan where one of the two does not vary."""
    x, y = (values.double() - values.double().mean() for values in (scores, lengths))
    scale = float((x.square().sum() * y.square().sum()).sqrt())
    return float((x * y).sum()) / scale if scale > 0 else float("nan")
