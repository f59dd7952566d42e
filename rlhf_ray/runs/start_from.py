"""The finished stages before PPO, taken over from another run folder: the same models under another PPO."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from rlhf_ray.config import Recipe
from rlhf_ray.config.recipe_file import build_recipe, flatten, read_yaml
from rlhf_ray.config.stage_table import STAGES
from rlhf_ray.errors import UserError
from rlhf_ray.runs.run_folder import RunFolder

#: What a stage's result depends on beside its own section. A reward model's scores are normalised on samples too, but
#: their mean and deviation are in its config.json, so another `generation` does not make it another model.
COMMON = ("seed", "model", "data")


def adopt_stages(recipe: Recipe, folder: RunFolder, source: RunFolder) -> list[str]:
    """Put the source's finished stages before PPO into the folder, as hard links where the file system has them.

    Returns their names; a stage that the folder has already stays. UserError where the source was made with another
    recipe; it names the keys.
    """
    if not source.recipe.exists():
        raise UserError(f"--start-from {source.path} is no run folder (it has no recipe.yaml)")
    theirs = build_recipe(read_yaml(str(source.recipe)), [], str(source.recipe))
    before_ppo = list(STAGES)[: list(STAGES).index("ppo")]
    wanted = [name for name in before_ppo if name in recipe.stages and name in theirs.stages]
    found = [name for name in wanted if source.stage(name).done and not folder.stage(name).path.exists()]
    sections = {part for name in found for part in (*COMMON, name, *STAGES[name].needs, *STAGES[name].reads)}
    differing = _differing(recipe, theirs, sections)
    if differing:
        raise UserError(
            f"--start-from {source.path} was made with another recipe: {', '.join(differing)}; set them to its values"
        )
    for name in found:
        link_tree(source.stage(name).path, folder.stage(name).path)
    return found


def _differing(ours: Recipe, theirs: Recipe, sections: set[str]) -> list[str]:
    """key (theirs -> ours) of what differs in the sections, except threads, which depend on the machine."""
    old, new = (flatten(one.model_dump(mode="json", include=sections)) for one in (theirs, ours))
    keys = sorted(
        key for key in old.keys() | new.keys() if old.get(key) != new.get(key) and not key.endswith(".threads")
    )
    return [f"{key} ({old.get(key)!r} -> {new.get(key)!r})" for key in keys]


def link_tree(source: Path, target: Path) -> None:
    """A copy that takes no space: files of a finished stage are replaced by a rename, never written in place."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary, copy_function=_link)
    os.rename(temporary, target)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)
