"""How far a run may trust its own reward model and judge, from the closing figures (DONE) of their stages.

A weak one tells good replies from bad no better than chance, as far as its 95 % interval says, or `max_minutes` ended its
training before the last planned step. Models from elsewhere and functions have no such figures: nothing is said of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlhf_ray.algorithms.intervals import Interval, correlation_interval, wilson
from rlhf_ray.config import Recipe
from rlhf_ray.errors import UserError
from rlhf_ray.runs.run_folder import RunFolder

STAGES = {"reward_model": "reward", "judge": "judge"}  # as summary.json's win rates are called -> stage


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """A trained reward model or judge on rows that it was not trained on."""

    stage: str
    measure: str  # "accuracy" on pairs, or "pearson", the correlation with people's scores
    figure: Interval | None  # None: could not be measured
    rows: int  # held-out pairs, or scored replies
    steps: int
    planned_steps: int  # more than `steps` where max_minutes ended the training

    @property
    def above_chance(self) -> bool:
        chance = 0.5 if self.measure == "accuracy" else 0.0
        return self.figure is not None and self.figure["low"] > chance

    @property
    def ended_early(self) -> bool:
        return self.steps < self.planned_steps

    @property
    def figure_in_words(self) -> str:
        """'accuracy 62.5 % (30.6 to 86.3) on 8 held-out pairs'."""
        kind = "pairs" if self.measure == "accuracy" else "scored replies"
        name = "accuracy" if self.measure == "accuracy" else "correlation with people's scores"
        if self.figure is None:
            return f"{name} unknown on {self.rows} held-out {kind}"
        scale, digits, unit = (100, 1, "\u00a0%") if self.measure == "accuracy" else (1, 2, "")
        mean, low, high = (f"{scale * self.figure[part]:.{digits}f}" for part in ("mean", "low", "high"))
        return f"{name} {mean}{unit} ({low}\u00a0to\u00a0{high}) on {self.rows} held-out {kind}"

    @property
    def problems(self) -> list[str]:
        """Why not to trust it, in words that follow its name: "is no better than chance ..."."""
        found: list[str] = []
        if not self.above_chance:
            found.append(f"is no better than chance as far as its interval says ({self.figure_in_words})")
        if self.ended_early:
            found.append(f"was stopped by {self.stage}.max_minutes at step {self.steps} of {self.planned_steps}")
        return found

    def to_json(self) -> dict[str, Any]:
        return {
            self.measure: self.figure, "rows": self.rows, "steps": self.steps, "planned_steps": self.planned_steps,
            "above_chance": self.above_chance, "figure_in_words": self.figure_in_words, "problems": self.problems,
        }  # fmt: skip


def standing_of(stage: str, done: Mapping[str, Any], objective: str) -> Standing | None:
    """Of a stage's closing figures: an ensemble's are those of all its members together. None where nothing was measured."""
    measure, figures = "accuracy" if objective == "pairs" else "pearson", done.get("ensemble", done)
    if measure not in figures:
        return None
    members = [done, *(each for name, each in done.items() if name.startswith("member_"))]
    # The member that was cut off the most.
    steps, planned = min(
        ((each.get("steps", 0), each.get("planned_steps", each.get("steps", 0))) for each in members),
        key=lambda pair: pair[0] / max(pair[1], 1),
    )
    rows = int(figures.get("pairs" if measure == "accuracy" else "eval_rows") or 0)
    return Standing(
        stage=stage, measure=measure, figure=_figure(figures, measure, rows), rows=rows, steps=steps, planned_steps=planned,
    )  # fmt: skip


def _figure(figures: Mapping[str, Any], measure: str, rows: int) -> Interval | None:
    """With the interval; of a stage that an older version trained, whose figures have none, as if rows were independent."""
    value, intervals = figures.get(measure), figures.get("intervals")
    if intervals is not None:
        return intervals.get(measure)
    if value is None or rows == 0:
        return None
    if measure == "pearson":
        return correlation_interval(value, rows)
    low, high = wilson(value, rows)
    return {"mean": value, "low": low, "high": high}


def standings(recipe: Recipe, folder: RunFolder) -> dict[str, Standing | None]:
    """Of the run's own reward model and judge; None for one that the run does not have, or not yet."""
    found: dict[str, Standing | None] = {}
    for name, stage in STAGES.items():
        section = recipe.reward if stage == "reward" else recipe.judge
        used = recipe.ppo.uses_reward_model if stage == "reward" else recipe.evaluation.judge_function is None
        done = folder.stage(stage).done and section is not None and used
        objective = "pairs" if section is None else section.objective
        found[name] = standing_of(stage, folder.stage(stage).summary(), objective) if done else None
    return found


def refuse_weak_reward(recipe: Recipe, folder: RunFolder) -> None:
    """UserError where PPO would train against a weak reward model that the recipe does not accept. Nothing before there is one."""
    standing, accepted = standings(recipe, folder)["reward_model"], recipe.ppo.accept_weak_reward
    if standing is None or accepted is True or not standing.problems:
        return
    if accepted == "early" and standing.above_chance:
        return
    remedy = "true" if not standing.above_chance else "early"
    raise UserError(
        f"PPO would train against a reward model that {' and '.join(standing.problems)}; train it on more data or longer "
        f"(reward.epochs, reward.max_minutes) or measure it on more rows (reward.eval_rows) in a new run folder, or accept it "
        f"as it is with ppo.accept_weak_reward: {remedy}"
    )
