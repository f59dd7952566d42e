"""A module of somebody else's that adds an advantage."""

from rlhf_ray import Advantage, register_advantage

register_advantage(
    Advantage(name="toy", estimate="rlhf_ray.algorithms.advantage_estimators:grpo", words="GRPO's", compares_samples=True)
)
