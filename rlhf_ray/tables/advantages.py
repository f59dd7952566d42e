"""Advantage estimators: the values of `ppo.advantage`.   B rollouts, T response tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf_ray.tables.table import Table, loaded

if TYPE_CHECKING:
    from rlhf_ray.algorithms.advantage_estimators import Estimator, ScoreBaseline


@dataclass(frozen=True, slots=True, kw_only=True)
class Advantage:
    """One way of saying which responses, or tokens, were better than expected."""

    name: str
    estimate: Estimator | str
    words: str  # in the recipe reference, after the name
    title: str = ""  # how report and terminal call a policy that it trained; "": its name
    needs_critic: bool = False
    compares_samples: bool = False  # the samples of a prompt, of which there have to be several
    whitens: bool = False  # advantages are centred and scaled over the batch, unless the recipe says otherwise
    #: of the scores, before the KL is taken off each token; None: scores as they are, and the KL counts in the comparison
    before_kl: ScoreBaseline | str | None = None

    @property
    def estimator(self) -> Estimator:
        return loaded(self.estimate)

    @property
    def score_baseline(self) -> ScoreBaseline | None:
        return None if self.before_kl is None else loaded(self.before_kl)


_HERE = "rlhf_ray.algorithms.advantage_estimators"
ADVANTAGES: Table[Advantage] = Table(
    "an advantage",
    Advantage(
        name="gae", title="PPO", estimate=f"{_HERE}:with_critic", words="has a critic", needs_critic=True, whitens=True,
    ),
    Advantage(
        name="rloo", title="RLOO", estimate=f"{_HERE}:rloo", words="a sample against the mean of the prompt's others",
        compares_samples=True,
    ),
    Advantage(
        name="grpo", title="GRPO", estimate=f"{_HERE}:grpo", words="against the mean of all, divided by their deviation",
        compares_samples=True,
    ),
    Advantage(
        name="dr_grpo", title="Dr. GRPO", estimate=f"{_HERE}:dr_grpo", words="without the division",
        compares_samples=True,
    ),
    Advantage(
        name="reinforce_pp", title="REINFORCE++", estimate=f"{_HERE}:reinforce_pp",
        words="the reward to go, whitened over the batch", whitens=True,
    ),
    Advantage(
        name="reinforce_pp_baseline", title="REINFORCE++ baseline", estimate=f"{_HERE}:reinforce_pp",
        words="the same of scores less the prompt's mean",
        compares_samples=True, whitens=True, before_kl=f"{_HERE}:group_centred",
    ),
)  # fmt: skip
