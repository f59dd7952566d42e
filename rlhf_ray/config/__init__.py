"""The recipe: every option of a run, typed, validated before anything starts, and frozen.

A default lives on its field and nowhere else; what follows from other fields is a property. This folder's README.md
has the reference, generated from these classes: each field carries its one-line description.

May import: errors, tables.
"""

from rlhf_ray.config.base import Precision, Section, exact_div
from rlhf_ray.config.data_sections import DataConfig, FromScratch, ModelConfig, SourceConfig, VotesConfig
from rlhf_ray.config.evaluation_section import EvaluationConfig
from rlhf_ray.config.generation_section import GenerationConfig
from rlhf_ray.config.kl_section import KlConfig
from rlhf_ray.config.ppo_section import PPOConfig
from rlhf_ray.config.recipe import Recipe
from rlhf_ray.config.resource_sections import GroupConfig, ResourcesConfig, RoleConfig, TrackingConfig
from rlhf_ray.config.reward_term import RewardTerm
from rlhf_ray.config.rounds_section import RoundsConfig
from rlhf_ray.config.supervised_sections import DpoConfig, LoraConfig, RewardConfig, SftConfig, TrainConfig

__all__ = [
    "DataConfig", "DpoConfig", "EvaluationConfig", "FromScratch", "GenerationConfig", "GroupConfig", "KlConfig",
    "LoraConfig", "ModelConfig", "PPOConfig", "Precision", "Recipe", "ResourcesConfig", "RewardConfig", "RewardTerm",
    "RoleConfig", "RoundsConfig", "Section", "SftConfig", "SourceConfig", "TrackingConfig", "TrainConfig", "VotesConfig",
    "exact_div",
]  # fmt: skip
