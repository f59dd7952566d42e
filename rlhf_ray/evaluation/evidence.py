"""What is known of one model's responses, before any figure of them.   P prompts, S seeds, N = P * S responses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from rlhf_ray.config import Recipe
from rlhf_ray.config.columns import Columns
from rlhf_ray.evaluation.estimates import Estimate, Resampler
from rlhf_ray.evaluation.samples import Responses
from rlhf_ray.messages import Scores

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, kw_only=True)
class Rated:
    """Responses under a language model."""

    logprobs: np.ndarray  # [N], each summed over its tokens
    tokens: np.ndarray  # [N], how many, in that model's tokenizer


@dataclass(slots=True, kw_only=True)
class Evidence:
    """Filled step by step; None where the recipe has nothing to measure it with. `mean` makes the usual figure."""

    recipe: Recipe
    resampler: Resampler
    prompts: list[str]  # [N], as stored: each as often as there are seeds
    columns: Columns  # the prompts' other columns, [N] each
    responses: Responses
    tokenizer: PreTrainedTokenizerBase  # of the model that drew them
    scores: Scores | None = None  # by PPO's reward
    judge: np.ndarray | None = None  # [N], normalised
    judge_scale: tuple[float, float] = (0.0, 1.0)  # (mean, deviation) that the judge is normalised with
    traits: dict[str, np.ndarray] = field(default_factory=dict)  # name -> [N]
    sft: Rated | None = None  # given their prompts, under the SFT model
    independent: Rated | None = None  # the same under the separately seeded model
    own: Rated | None = None  # the same under the better of the two
    other_text: Rated | None = None  # the texts of `data.other_text` under the model itself, one for each
    other: np.ndarray | None = None  # [N], as `own`'s log-probs, given other prompts

    def table(self, values) -> np.ndarray:
        """[N] -> [P, S]."""
        return np.asarray(values).reshape(self.resampler.prompts, -1)

    def mean(self, values) -> Estimate:
        """Of one number for each response, [N]."""
        return self.resampler.mean(self.table(values))
