"""The recipe's data lists, or a builder's roles: which of them are read, and in which form."""

from __future__ import annotations

from collections.abc import Collection

from rlhf_ray.config import Recipe, RewardConfig
from rlhf_ray.config.stage_table import STAGES
from rlhf_ray.data.formats import Role

LISTS = ("sft", "preferences", "judge", "prompts", "eval_prompts", "other_text")


def needed_lists(recipe: Recipe) -> dict[str, str]:
    """The recipe's data lists that must not be empty -> the section that needs them."""
    needed: dict[str, str] = {}
    for name in recipe.stages:
        for role in STAGES[name].lists:
            needed.setdefault(role, name)
    return needed


def preference_section(recipe: Recipe, role: str) -> RewardConfig | None:
    """The config that sets the form and limits of a list of preferences; None where nothing is trained on them.

    DPO learns from the reward model's pairs. Where there is no reward model, they are prepared as if there were one.
    """
    name = needed_lists(recipe).get(role) if role in ("preferences", "judge") else None
    if name is None:
        return None
    section = recipe.section(name)
    if isinstance(section, RewardConfig):
        return section
    return RewardConfig(max_length=recipe.max_length_of(name)) if name in recipe.trained else RewardConfig()


def form_of(recipe: Recipe, role: str) -> Role:
    """The form of the rows of a list, or of what a builder returns for this role."""
    part = role.partition("_eval")[0]
    section = preference_section(recipe, part)
    if section is not None:
        return section.objective
    return "sft" if part in ("sft", "other_text") else "prompts"


def is_read(role: str, needed: Collection[str], given: Collection[str]) -> bool:
    """Whether rows of this role are used: by a stage, as prompts, or by the evaluation. given: all roles that have rows."""
    part = role.partition("_eval")[0]
    return part in needed or role.endswith("prompts") or role == "other_text" or (part == "preferences" and "prompts" not in given)


def prompt_origins(given: Collection[str]) -> tuple[str, ...]:
    """Of the given roles, those whose rows become prompts (`_Preparation._prompts`)."""
    origin = next((role for role in ("prompts", "preferences", "sft") if role in given), "prompts")
    return (origin, f"{origin}_eval", "eval_prompts")
