"""RLHF on Ray: preferences in, an aligned and served language model out.

from rlhf_ray import load_recipe, run
folder = run(load_recipe("demo"))
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from rlhf_ray.config import Recipe
from rlhf_ray.config.plugins import register_stage
from rlhf_ray.config.recipe_file import load_recipe
from rlhf_ray.config.stage_table import Stage, StageModel
from rlhf_ray.errors import StageStopped, UserError

if TYPE_CHECKING:
    from rlhf_ray.cli.running import run
    from rlhf_ray.tables.register import (
        Advantage,
        Engine,
        Family,
        Figure,
        RewardKind,
        register_advantage,
        register_engine,
        register_family,
        register_figure,
        register_reward,
    )

__all__ = [
    "Advantage", "Engine", "Family", "Figure", "Recipe", "RewardKind", "Stage", "StageModel", "StageStopped", "UserError",
    "load_recipe", "register_advantage", "register_engine", "register_family", "register_figure", "register_reward",
    "register_stage", "run",
]  # fmt: skip

# Late: `run` brings Ray along, and reading a recipe should not.
_LATE = {"run": "rlhf_ray.cli.running"}


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module 'rlhf_ray' has no attribute {name!r}")
    # getattr: a module's name is looked up when somebody asks for it.
    return getattr(import_module(_LATE.get(name, "rlhf_ray.tables.register")), name)
