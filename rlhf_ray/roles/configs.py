"""The configs of the roles, made from the recipe.

`PolicyLossConfig` is here and not in `roles.trainer`: that loads transformers, which the experience does not need.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlhf_ray.algorithms.experience import AdvantageConfig
from rlhf_ray.algorithms.losses import Aggregation
from rlhf_ray.config import Recipe
from rlhf_ray.roles.experience_maker import ExperienceConfig
from rlhf_ray.tables.advantages import ADVANTAGES


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyLossConfig:
    """What the policy's update minimises, and when it stops early."""

    clip_range: float
    clip_range_high: float
    dual_clip: float | None
    aggregation: Aggregation
    max_new_tokens: int
    kl_loss: Literal["k1", "k2", "k3"] | None  # estimator; None: the KL is in the reward
    entropy_coef: float
    max_approx_kl: float | None


def experience_config(recipe: Recipe) -> ExperienceConfig:
    ppo, resources = recipe.ppo, recipe.resources
    advantages = AdvantageConfig(
        advantage=ADVANTAGES.named(ppo.advantage), group_size=ppo.samples_per_prompt, kl_in_reward=ppo.kl_in == "reward",
        kl_estimator=ppo.kl_estimator, gamma=ppo.gamma, gae_lambda=ppo.gae_lambda,
        score_clip=ppo.score_clip, missing_eos_penalty=ppo.missing_eos_penalty,
        missing_eos_score=ppo.missing_eos_score, overlong_buffer=ppo.overlong_buffer,
        max_new_tokens=recipe.generation.max_new_tokens, whiten_rewards=ppo.whiten_rewards,
        whiten_advantages=ppo.whitens_advantages,
    )  # fmt: skip
    return ExperienceConfig(
        advantages=advantages, minibatch_size=ppo.minibatch_size, ppo_epochs=ppo.ppo_epochs,
        policy_ranks=resources.policy.actors, critic_ranks=resources.critic.actors if ppo.has_critic else 0,
        seed=recipe.ppo_seed, importance_cap=ppo.importance_cap if ppo.corrects_importance else None,
    )  # fmt: skip


def policy_loss_config(recipe: Recipe) -> PolicyLossConfig:
    ppo = recipe.ppo
    return PolicyLossConfig(
        clip_range=ppo.clip_range, clip_range_high=ppo.clip_range_high or ppo.clip_range, dual_clip=ppo.dual_clip,
        aggregation=ppo.loss_aggregation, max_new_tokens=recipe.generation.max_new_tokens,
        kl_loss=ppo.kl_estimator if ppo.kl_in == "loss" else None, entropy_coef=ppo.entropy_coef,
        max_approx_kl=ppo.max_approx_kl,
    )  # fmt: skip
