"""Stages that a package of one's own adds to the table.

    from rlhf_ray import Stage, register_stage
    register_stage(Stage(name="toy", title="Toy", words="toy stage", section=ToyConfig, run="my_package.toy:run", ...))

in a module that the recipe names under `plugins`.
"""

from __future__ import annotations

import re

from rlhf_ray.config.recipe import Recipe
from rlhf_ray.config.stage_table import STAGES, SUPERVISED, Stage
from rlhf_ray.config.supervised_sections import TrainConfig
from rlhf_ray.errors import UserError

IN_RUN_FOLDER = ("logs", "uploads", "tensorboard")  # folders there that belong to no stage


def register_stage(stage: Stage) -> None:
    """Put the stage in the table, in its place. The same one again changes nothing. UserError for one that can't be added."""
    if STAGES.get(stage.name) == stage:
        return
    _check(stage)
    names = list(STAGES)
    names.insert(len(names) if stage.before is None else names.index(stage.before), stage.name)
    ordered = {name: STAGES.get(name, stage) for name in names}
    STAGES.clear()
    STAGES.update(ordered)


def _check(stage: Stage) -> None:
    where = f"register_stage: the stage '{stage.name}'"
    if not re.fullmatch(r"[a-z][a-z0-9_]*", stage.name):
        raise UserError(f"{where} needs a name of small letters, digits and '_' that starts with a letter")
    if stage.name in (*STAGES, *Recipe.model_fields, *IN_RUN_FOLDER):
        raise UserError(f"{where} has a name that is taken; choose another")
    if stage.section is None:
        raise UserError(f"{where} has no section; give the Section class that its key in the recipe holds")
    if stage.run == SUPERVISED and (stage.train is None or not issubclass(stage.section, TrainConfig)):
        raise UserError(f"{where} has no `run`; give one, or `train` and a section that inherits from TrainConfig")
    if stage.before is not None and stage.before not in STAGES:
        raise UserError(f"{where} comes before '{stage.before}', which is not a stage; there are {', '.join(STAGES)}")
    names = list(STAGES)
    earlier = names if stage.before is None else names[: names.index(stage.before)]
    for needed in stage.needs:
        if needed not in earlier:
            raise UserError(
                f"{where} needs '{needed}', which is not among the stages before it ({', '.join(earlier)}); "
                "correct `needs` or `before`"
            )
