"""What a user's module calls to add an entry: `from rlhf_ray import Advantage, register_advantage`, and so on.

Every process of a run has to import that module before it reads a recipe.
"""

from __future__ import annotations

from rlhf_ray.tables.advantages import ADVANTAGES, Advantage
from rlhf_ray.tables.rewards import REWARDS, RewardKind

__all__ = ["Advantage", "RewardKind", "register_advantage", "register_reward"]


def register_advantage(advantage: Advantage) -> Advantage:
    """A value of `ppo.advantage`."""
    return ADVANTAGES.add(advantage)


def register_reward(kind: RewardKind) -> RewardKind:
    """A `kind` of a term of `ppo.rewards`."""
    return REWARDS.add(kind)
