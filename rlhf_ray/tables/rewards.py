"""Kinds of reward: what a term of `ppo.rewards` may be. A term is of the kind that its keys say, or that its `kind` names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf_ray.tables.table import Table, loaded

if TYPE_CHECKING:
    from rlhf_ray.config import Recipe, RewardTerm
    from rlhf_ray.config.columns import Asked
    from rlhf_ray.rewards.from_recipe import Setting
    from rlhf_ray.rewards.scorer import Scorer


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardKind:
    """One kind of scorer."""

    name: str
    make: Callable[[Setting], Scorer] | str
    words: str
    #: whether a term without `kind` is of this kind; None: only a term that says so
    chosen_by: Callable[[RewardTerm], bool] | None = None
    #: columns of the prompts' rows, beside the prompt, that a term of this kind asks for; None: none
    columns: Callable[[RewardTerm], Asked] | str | None = None
    #: (recipe, the term's key in the recipe, the term) -> what would stop it, a sentence each; None: nothing to look at
    problems: Callable[[Recipe, str, RewardTerm], list[str]] | str | None = None

    def scorer(self, setting: Setting) -> Scorer:
        return loaded(self.make)(setting)

    def asked(self, term: RewardTerm) -> Asked | None:
        return None if self.columns is None else loaded(self.columns)(term)

    def found_problems(self, recipe: Recipe, key: str, term: RewardTerm) -> list[str]:
        return [] if self.problems is None else loaded(self.problems)(recipe, key, term)


_MAKE, _CHECK, _COLUMNS = "rlhf_ray.rewards.from_recipe", "rlhf_ray.rewards.reward_problems", "rlhf_ray.config.columns"
REWARDS: Table[RewardKind] = Table(
    "a kind of reward",
    RewardKind(
        name="reward_stage", make=f"{_MAKE}:stage_models", words="the reward stage's model, or the ensemble of them",
        chosen_by=lambda term: term.model == "reward",
    ),
    RewardKind(
        name="model", make=f"{_MAKE}:other_model", words="another reward model, from a folder or the hub",
        chosen_by=lambda term: term.model not in (None, "reward"), problems=f"{_CHECK}:model_problems",
    ),
    RewardKind(
        name="function", make=f"{_MAKE}:function", words="a function, called in the reward actor",
        chosen_by=lambda term: term.function is not None and term.timeout_s is None,
        columns=f"{_COLUMNS}:asked_by_term", problems=f"{_CHECK}:function_problems",
    ),
    RewardKind(
        name="isolated_function", make=f"{_MAKE}:isolated_function",
        words="a function with a time limit, in a process of its own",
        chosen_by=lambda term: term.function is not None and term.timeout_s is not None,
        columns=f"{_COLUMNS}:asked_by_term", problems=f"{_CHECK}:function_problems",
    ),
)  # fmt: skip


def kind_of(term: RewardTerm) -> RewardKind:
    """The kind of a term that has passed its own checks."""
    if term.kind is not None:
        return REWARDS.named(term.kind)
    return next(kind for kind in REWARDS.values() if kind.chosen_by is not None and kind.chosen_by(term))
