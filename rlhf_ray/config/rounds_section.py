"""The section of the further rounds (`rlhf-ray round`)."""

from __future__ import annotations

from typing import Literal

from rlhf_ray.config.base import Section, option


class RoundsConfig(Section):
    """Further rounds of training on people's votes, each from the policy of the round before."""

    reference: Literal["last", "first"] = option(
        "last", "what PPO stays close to: the policy that the round starts from, or the one that the run started from"
    )
    least_new_votes: int = option(20, "a round needs this many votes that the round before did not have", gt=0)
    decided_by: Literal["judge", "reward_model"] | None = option(
        None, "whose win rate decides; null: the judge's, where enough held-out pairs say how often it agrees with people"
    )
    margin: float = option(
        0.0, "a round is better if people are expected to prefer it in more than 0.5 + this of comparisons", ge=0, lt=0.5
    )
    least_held_out: int = option(
        30, "with fewer held-out pairs of votes, those of the preferences say how often the scorer agrees with people", gt=0
    )
