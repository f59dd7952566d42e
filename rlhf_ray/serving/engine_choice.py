"""Which engine a server draws with: the one that is asked for, else the one that the run's recipe names, else torch.

Serving writes one token at a time to many readers, who come and go: it needs an engine with an open batch
(`tables.engines`: continuous). vLLM's, as this package runs it, draws closed batches.
"""

from __future__ import annotations

from pathlib import Path

from rlhf_ray.config.recipe_file import load_recipe
from rlhf_ray.errors import UserError
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.tables.engines import ENGINES

DEFAULT = "torch"


def choose_engine(asked: str | None, path: str | Path, gpus: float) -> tuple[str, str | None]:
    """(the engine's name, what to tell where it is not the recipe's). gpus: of each replica.

    Raises UserError for an engine that is asked for and can't serve; the recipe's, which was chosen for training, only
    gives way.
    """
    if asked is not None:
        problem = _problem(asked, gpus)
        if problem is not None:
            raise UserError(f"{problem}; give --engine {DEFAULT}, or leave it out")
        return asked, None
    named = _of_recipe(Path(path).expanduser().resolve())
    problem = _problem(named, gpus)
    return (named, None) if problem is None else (DEFAULT, f"drawing with {DEFAULT}: {problem}")


def _problem(name: str, gpus: float) -> str | None:
    engine = ENGINES.named(name)
    if not engine.continuous:
        return f"the engine {name} has no batch that requests join and leave between tokens, which serving needs"
    return engine.problem_here(gpus)


def _of_recipe(folder: Path) -> str:
    """Of the run folder that `folder` is, or is a stage's model of; torch where there is none."""
    for place in (folder, folder.parent.parent):
        recipe = RunFolder(place).recipe
        if recipe.is_file():
            try:
                return load_recipe(str(recipe)).generation.engine
            except UserError:  # of another version of this package: its model can be served all the same
                return DEFAULT
    return DEFAULT
