"""Which engine a server draws with: the one that is asked for, else the one that the run's recipe names, else torch.

Serving writes one token at a time to many readers, who come and go: it needs an engine with an open batch
(`tables.engines`: continuous).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rlhf_ray.config.recipe_file import load_recipe
from rlhf_ray.config.user_paths import expanded
from rlhf_ray.errors import UserError
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.tables.engines import ENGINES

DEFAULT = "torch"


@dataclass(frozen=True, slots=True)
class EngineChoice:
    name: str
    note: str | None = None  # what to tell where something of the recipe is left out
    plugins: tuple[str, ...] = ()  # modules of the run's recipe: the engine or the model's class may be theirs


def choose_engine(asked: str | None, path: str | Path, gpus: float) -> EngineChoice:
    """gpus: of each replica.

    Raises UserError for an engine that is asked for and can't serve; the recipe's, which was chosen for training, only
    gives way.
    """
    named, plugins, without = _of_recipe(expanded(path).resolve())
    if asked is not None:
        problem = _problem(asked, gpus)
        if problem is not None:
            raise UserError(f"{problem}; give --engine {DEFAULT}, or leave it out")
        return EngineChoice(asked, without, plugins)
    problem = _problem(named, gpus)
    if problem is None:
        return EngineChoice(named, without, plugins)
    return EngineChoice(DEFAULT, f"drawing with {DEFAULT}: {problem}", plugins)


def _problem(name: str, gpus: float) -> str | None:
    engine = ENGINES.named(name)
    if not engine.continuous:
        return f"the engine {name} has no batch that requests join and leave between tokens, which serving needs"
    return engine.problem_here(gpus)


def _of_recipe(folder: Path) -> tuple[str, tuple[str, ...], str | None]:
    """(engine, plugins, a note where the recipe can't be used) of the run folder that `folder` is, or is a stage's model of; torch
    where there is none."""
    for place in (folder, folder.parent.parent):
        path = RunFolder(place).recipe
        if path.is_file():
            try:
                recipe = load_recipe(str(path))
            except UserError as error:  # of another version, or of a plugin that is not here: the model can be served all the same
                why = str(error).splitlines()[0]
                return DEFAULT, (), f"serving without the run's recipe, its engine and its plugins' stages: {why}"
            return recipe.generation.engine, recipe.plugins, None
    return DEFAULT, (), None
