"""What a user's module calls to add an entry: `from rlhf_ray import Advantage, register_advantage`, and so on.

Every process of a run has to import that module before it reads a recipe.
"""

from __future__ import annotations

from rlhf_ray.tables.advantages import ADVANTAGES, Advantage
from rlhf_ray.tables.engines import ENGINES, Engine
from rlhf_ray.tables.families import FAMILIES, Family
from rlhf_ray.tables.figures import FIGURES, Figure
from rlhf_ray.tables.rewards import REWARDS, RewardKind

__all__ = [
    "Advantage", "Engine", "Family", "Figure", "RewardKind",
    "register_advantage", "register_engine", "register_family", "register_figure", "register_reward",
]  # fmt: skip


def register_advantage(advantage: Advantage) -> Advantage:
    """A value of `ppo.advantage`."""
    return ADVANTAGES.add(advantage)


def register_reward(kind: RewardKind) -> RewardKind:
    """A `kind` of a term of `ppo.rewards`."""
    return REWARDS.add(kind)


def register_engine(engine: Engine) -> Engine:
    """A value of `generation.engine`, and of `rlhf-ray serve --engine`."""
    return ENGINES.add(engine)


def register_family(family: Family) -> Family:
    """A value of `model.from_scratch.architecture`, where it has a config."""
    return FAMILIES.add(family)


def register_figure(figure: Figure) -> Figure:
    """A figure of the evaluation, in summary.json, the report and (with `short`) the closing table."""
    return FIGURES.add(figure)
