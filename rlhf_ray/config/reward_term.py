"""A term of `ppo.rewards`."""

from __future__ import annotations

from typing import Any

from pydantic import model_validator

from rlhf_ray.config.base import LONGEST_S, Section, option
from rlhf_ray.tables.rewards import REWARDS


class RewardTerm(Section):
    """One of several rewards whose weighted sum is the score."""

    weight: float = option(1.0, "factor of this term in the sum; negative: a penalty")
    function: str | None = option(
        None,
        "package.module:function scoring (prompts, responses), and columns of the prompts' rows that its other parameters "
        "name; this or model",
    )
    model: str | None = option(
        None, "'reward' (the reward stage's model or ensemble), or a folder / hub name of a reward model; this or function"
    )
    kind: str | None = option(None, "name of a kind of reward that a plugin registered; in place of function and model")
    options: dict[str, Any] = option({}, "what that kind reads")
    timeout_s: float | None = option(
        None, "longest time of the function per sample; it gets one sample at a time, in a process of its own; null: no limit",
        gt=0, le=LONGEST_S,
    )  # fmt: skip
    timeout_score: float | None = option(None, "score of a sample over the limit, before the weight; null: the run stops")

    @model_validator(mode="after")
    def _one_source(self):
        if self.kind is not None:
            problem = REWARDS.problem(self.kind)
            if problem is not None:
                raise ValueError(f"kind: {problem}")
            if REWARDS[self.kind].chosen_by is not None:
                raise ValueError(f"kind {self.kind} follows from the keys function, model and timeout_s; remove kind")
            if self.function is not None or self.model is not None:
                raise ValueError(f"the term has kind {self.kind} and a function or model; give it one of the three")
        elif self.options:
            raise ValueError(f"options are {self.options}, but there is no kind that reads them; set kind, or remove them")
        elif (self.function is None) == (self.model is None):
            has = "neither" if self.function is None else "both"
            raise ValueError(f"the term has {has} function and model; give it exactly one of the two")
        if self.timeout_s is not None and self.function is None:
            other = f"model '{self.model}'" if self.kind is None else f"kind {self.kind}"
            raise ValueError(f"timeout_s is {self.timeout_s:g}, but {other} is not a function; remove timeout_s")
        if self.timeout_score is not None and self.timeout_s is None:
            raise ValueError(f"timeout_score is {self.timeout_score:g}, but there is no timeout_s; set it too")
        return self
