"""A package of somebody else's: two stages, one that runs on the driver and one in Ray Train's workers."""

from rlhf_ray import Stage, UserError, register_stage
from rlhf_ray.config import Section, TrainConfig
from rlhf_ray.config.base import option
from rlhf_ray.runs.metrics import MetricsWriter


class ToyConfig(Section):
    """Halves a loss."""

    steps: int = option(4, "how often", gt=0)
    start: float = option(8.0, "the loss at first", gt=0)


class TaughtConfig(TrainConfig):
    """Trains nothing."""

    answer: int = option(42, "what it leaves")


def halve(recipe, folder, stage, progress):
    config = recipe.section(stage)
    with MetricsWriter(folder.stage(stage).metrics) as metrics:
        for step in range(1, config.steps + 1):
            loss = config.start / 2**step
            metrics.write(step, {"loss": loss})
            progress({"stage": stage, "step": step, "total": config.steps, "loss": loss})
    return {"steps": config.steps, "final_loss": loss}


def teach(recipe, folder, stage):
    section = recipe.section(stage)
    if section.answer < 0:
        raise UserError(f"{stage}.answer is {section.answer}; set it to 0 or more")
    toy = folder.stage("toy").summary()
    with MetricsWriter(folder.stage(stage).metrics) as metrics:
        metrics.write(1, {"loss": toy["final_loss"], "progress": 1.0})
    return {"ended_by": "steps", "answer": section.answer, "threads": section.threads}


register_stage(
    Stage(name="toy", title="Toy stage", words="a toy's turn", section=ToyConfig, run="toy_plugin:halve", workers="none",
          needs=("data",))
)  # fmt: skip
register_stage(
    Stage(name="taught", title="Taught stage", words="teaching", section=TaughtConfig, train="toy_plugin:teach",
          needs=("data", "toy"))
)  # fmt: skip
