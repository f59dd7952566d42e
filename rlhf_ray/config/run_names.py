"""What a run calls its algorithm, what that starts from and what rewards it, in report and terminal: by what its recipe has.

The words that all runs share say "PPO", "SFT" and "reward model", the full set. `RunNames.told` puts a run's own in their place.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, cast

from rlhf_ray.tables.advantages import ADVANTAGES


@dataclass(frozen=True, slots=True, kw_only=True)
class RunNames:
    """The defaults are those of a run with SFT, a reward model and PPO."""

    tuned: str = "PPO"  # the algorithm
    has_sft: bool = True  # else the policy starts from the recipe's own model
    reward: str = "reward model"  # or "reward function", or "reward" where that is a sum of several

    def told(self, text: str) -> str:
        """`text`, which speaks of PPO, SFT and the reward model, with this run's names."""
        for pattern, words in self._replacements:
            text = re.sub(pattern, words, text)
        return text

    @property
    def _replacements(self) -> list[tuple[str, str]]:
        found: list[tuple[str, str]] = []
        if self.tuned != "PPO":
            found.append((r"\bPPO\b", self.tuned))
        if not self.has_sft:
            found += [(r"\bSFT model", "start model"), (r"\bSFT samples\b", "the start's samples"), (r"^SFT$", "Start"),
                      (r"^SFT\b", "The start"), (r"\bSFT\b", "the start")]  # fmt: skip
        if self.reward != "reward model":
            found += [(r"\breward[ -]model\b", self.reward), (r"\bReward[ -]model\b", self.reward.capitalize())]
        return found

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def names_of(recipe: Mapping[str, Any]) -> RunNames:
    """Of a recipe as its file holds it, with every default; a plugin that it names need not be imported."""
    ppo = cast(Mapping[str, Any], recipe.get("ppo") or {})
    name = str(ppo.get("advantage", "gae"))
    advantage = ADVANTAGES.get(name)
    tuned = name if advantage is None else advantage.title or name
    # A file that does not hold the key yet (a run that has just begun) has the default, which is a stage.
    return RunNames(tuned=tuned, has_sft=recipe.get("sft", {}) is not None, reward=_reward(ppo))


def _reward(ppo: Mapping[str, Any]) -> str:
    terms = cast(Mapping[str, Mapping[str, Any]], ppo.get("rewards") or {})
    if not terms:
        return "reward model" if ppo.get("reward_function") is None else "reward function"
    if len(terms) > 1:
        return "reward"
    (term,) = terms.values()
    kinds = {"model": "reward model", "function": "reward function"}
    return next((words for key, words in kinds.items() if term.get(key) is not None), "reward")
