"""Masks and ragged batches for the tests of `rlhf_ray.algorithms`."""

import torch

from rlhf_ray.algorithms.experience import AdvantageConfig
from rlhf_ray.algorithms.losses import (
    policy_loss,
    token_weights,
    value_loss,
)
from rlhf_ray.tables.advantages import ADVANTAGES

NAN = float("nan")


def masks(*lengths):
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def floats(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def ragged(seed, rows=5, width=7):
    """(mask, generator) of rows with 1..width tokens, the longest among them."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, width + 1, (rows,), generator=generator).tolist()
    return masks(*lengths[:-1], width), generator


def losses(kind, now, old, target, mask, num_tokens, **options):
    if kind == "policy":
        weights = token_weights(
            mask, "token", num_tokens=num_tokens, num_sequences=0, max_new_tokens=0, dtype=now.dtype
        )
        options = {"clip_range": 0.2, "clip_range_high": 0.2, "dual_clip": None} | options
        return policy_loss(now, old, target, mask, weights, num_tokens=num_tokens, **options)
    return value_loss(now, old, target, mask, value_clip_range=0.2, num_tokens=num_tokens)


CONFIG = AdvantageConfig(
    advantage=ADVANTAGES["gae"], group_size=1, kl_in_reward=True, kl_estimator="k1", gamma=1.0, gae_lambda=0.5,
    score_clip=None, missing_eos_penalty=1.0,
        missing_eos_score=None, overlong_buffer=0, max_new_tokens=3, whiten_rewards=False, whiten_advantages=False,
)  # fmt: skip
