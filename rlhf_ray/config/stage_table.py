"""The table of stages: what a run is made of, in order. Whatever depends on which stages there are reads it.

A new stage is its code and one entry: here, or by `plugins.register_stage` in a module that a recipe's `plugins` names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from rlhf_ray.config.base import Section

if TYPE_CHECKING:
    from rlhf_ray.config.recipe import Recipe

SUPERVISED = "rlhf_ray.actors.supervised:run_supervised"  # starts Ray Train's workers, which call the stage's `train`


@dataclass(frozen=True, slots=True, kw_only=True)
class StageModel:
    """The model that a stage leaves in its folder's model/."""

    kind: Literal["policy", "language", "score"]  # policy: its answers are what a run is for; score: a reward model
    words: str  # on its card: "This is <words>."

    @property
    def task(self) -> str:
        """The hub's name for what it does."""
        return "text-classification" if self.kind == "score" else "text-generation"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One stage.

    A function is written "package.module:function" and imported when the stage runs. `run` is called on the driver as
    run(recipe, folder, name, progress); what it returns are the closing figures, which become the file DONE. `train` is
    called in each Ray Train worker as train(recipe, folder, name).
    """

    name: str  # its key in the recipe and its folder in the run folder
    title: str  # in the report
    words: str  # in the terminal
    run: str = SUPERVISED
    train: str | None = None  # with `run` left as it is
    check: str | None = None  # of the results of others; called as check(recipe, folder) before the stage starts; raises UserError
    section: type[Section] | None = None  # what its key in the recipe holds; None: a typed field of Recipe
    needs: tuple[str, ...] = ()  # stages whose results it reads, those that the recipe has
    needs_too: Callable[[Recipe], tuple[str, ...]] | None = None  # those that it reads under some recipes only
    reads: tuple[str, ...] = ()  # sections that its result follows from, beside its own and those of `needs`
    lists: tuple[str, ...] = ()  # lists of `data` that it needs
    before: str | None = "ppo"  # of a registered stage: it comes directly before this one; None: last
    workers: Literal["none", "supervised", "ppo"] = "supervised"  # its processes; none: the driver alone, without Ray
    model: StageModel | None = None
    pairs_title: str | None = None  # of its column, where its closing figures say how well it tells replies apart
    command: str | None = None  # the command that runs it; None: `stage NAME`
    help: str | None = None  # of that command, from the stage that it is named for
    brings_needs: bool = True  # its command first runs what it needs; False: that has to be done

    @property
    def started_by(self) -> str:
        """What follows `rlhf-ray` on the command line."""
        return self.command or f"stage {self.name}"


def _judge_of_ppo(recipe: Recipe) -> tuple[str, ...]:
    asks_model = recipe.ppo.judge_evaluations and recipe.evaluation.judge_function is None
    return ("judge",) if asks_model else ()


def _tuned_models(recipe: Recipe) -> tuple[str, ...]:
    return tuned_stages(recipe)


_BUILT_IN = (
    Stage(
        name="data", title="Data", words="data", run="rlhf_ray.actors.ray_stages:prepare_data", workers="none", command="sft",
    ),
    Stage(
        name="sft", title="SFT", words="supervised fine-tuning", train="rlhf_ray.supervised.sft:train_sft",
        needs=("data",), lists=("sft",), command="sft", help="Supervised fine-tuning (and the data it needs).",
        model=StageModel(kind="policy", words="a language model fine-tuned on demonstrations"),
    ),
    Stage(
        name="fluency", title="Fluency model", words="fluency model", train="rlhf_ray.supervised.sft:train_sft",
        needs=("data",), lists=("sft",), command="reward",
        model=StageModel(kind="language", words="a separately seeded language model, used to measure fluency"),
    ),
    Stage(
        name="reward", title="Reward model", words="reward model", train="rlhf_ray.supervised.reward_model:train_reward",
        needs=("data", "sft"), lists=("preferences",), pairs_title="Reward model", command="reward",
        help="The fluency model, the reward model and the judge, those that the recipe has.",
        model=StageModel(kind="score", words="a reward model: one raw logit per text, read at EOS"),
    ),
    Stage(
        name="judge", title="Judge", words="independent judge", train="rlhf_ray.supervised.reward_model:train_reward",
        needs=("data", "sft"), reads=("fluency",), lists=("judge",), pairs_title="Judge", command="reward",
        model=StageModel(kind="score", words="an independent judge: one raw logit per text, read at EOS"),
    ),
    Stage(
        name="dpo", title="DPO", words="DPO", train="rlhf_ray.supervised.dpo:train_dpo",
        needs=("data", "sft"), reads=("reward",), lists=("preferences",),  # the pairs are prepared for the reward model
        pairs_title="DPO's implicit reward", command="dpo",
        help="DPO on the reward model's pairs (and the data and SFT it needs).",
        model=StageModel(kind="policy", words="a language model tuned with DPO on preferences between pairs of replies"),
    ),
    Stage(
        name="ppo", title="PPO", words="PPO", run="rlhf_ray.actors.ray_stages:run_ppo_stage", workers="ppo",
        needs=("data", "sft", "reward"), needs_too=_judge_of_ppo, command="ppo", brings_needs=False,
        check="rlhf_ray.rewards.standing:refuse_weak_reward",
        help="PPO on the run folder's SFT and reward model.",
        model=StageModel(kind="policy", words="a language model tuned with PPO against a reward model"),
    ),
    Stage(
        name="evaluation", title="Evaluation", words="evaluation", run="rlhf_ray.actors.ray_stages:evaluate_and_report",
        workers="ppo", needs=("sft", "fluency", "reward", "judge"), needs_too=_tuned_models, command="evaluate",
        brings_needs=False, help="The tuned models against the SFT model on held-out prompts, and the report.",
    ),
)  # fmt: skip
BUILT_IN = tuple(stage.name for stage in _BUILT_IN)
ALWAYS = ("data", "ppo", "evaluation")  # what every recipe has; the section of another stage may be null
STAGES = {stage.name: stage for stage in _BUILT_IN}  # with those of plugins that this process has imported


def needs_of(recipe: Recipe, name: str) -> tuple[str, ...]:
    """The recipe's stages that the stage reads."""
    stage, there = STAGES[name], recipe.stages
    needed = stage.needs + (stage.needs_too(recipe) if stage.needs_too is not None else ())
    return tuple(other for other in needed if other in there)


def all_needs_of(recipe: Recipe, name: str) -> tuple[str, ...]:
    """Those and what they need in turn, in the order of the run."""
    found, left = set[str](), [name]
    while left:
        new = set(needs_of(recipe, left.pop())) - found
        found |= new
        left += new
    return tuple(other for other in recipe.stages if other in found)


def tuned_stages(recipe: Recipe) -> tuple[str, ...]:
    """The stages whose policies the evaluation measures against the SFT model: PPO first."""
    others = [name for name in recipe.stages if name not in ("sft", "ppo") and has_model(name, "policy")]
    return ("ppo", *others)


def has_model(name: str, *kinds: str) -> bool:
    """Whether the stage leaves a model, of one of these kinds if any are given."""
    model = STAGES[name].model
    return model is not None and (not kinds or model.kind in kinds)


def model_names() -> list[str]:
    """What can be exported of a run folder: the stages that leave a model, and PPO's best one."""
    return ["best", *(name for name in STAGES if has_model(name))]


def policies() -> list[str]:
    """The stages that leave a policy, the one to serve first: the last."""
    return [name for name in reversed(STAGES) if has_model(name, "policy")]


def stages_of_command(command: str) -> list[str]:
    """What a command is there for, in order: without those of its stages that another of them needs."""
    names = [name for name, stage in STAGES.items() if stage.command == command]
    needed = {other for name in names for other in STAGES[name].needs}
    return [name for name in names if name not in needed]
