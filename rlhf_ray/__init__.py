"""RLHF on Ray: preferences in, an aligned and served language model out.

from rlhf_ray import load_recipe, run
folder = run(load_recipe("demo"))
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_ray.config import Recipe
from rlhf_ray.config.plugins import register_stage
from rlhf_ray.config.recipe_file import load_recipe
from rlhf_ray.config.stage_table import Stage, StageModel
from rlhf_ray.errors import StageStopped, UserError

if TYPE_CHECKING:
    from rlhf_ray.cli.running import run

__all__ = [
    "Recipe", "Stage", "StageModel", "StageStopped", "UserError", "load_recipe", "register_stage", "run",
]  # fmt: skip


def __getattr__(name: str):
    # Late: `run` brings Ray along, and reading a recipe should not.
    if name == "run":
        from rlhf_ray.cli.running import run

        return run
    raise AttributeError(f"module 'rlhf_ray' has no attribute {name!r}")
