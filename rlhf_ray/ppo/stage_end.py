"""What the PPO stage ends with: the step whose policy is its model, and its DONE."""

from __future__ import annotations

from typing import Any

from rlhf_ray.config import PPOConfig
from rlhf_ray.ppo.loop import LoopState


def rolls_back(state: LoopState, ppo: PPOConfig) -> bool:
    """Whether the stage's model is that of an earlier step than the last."""
    return ppo.roll_back and 0 <= state.best_step < state.step


def closing_figures(state: LoopState, ppo: PPOConfig) -> dict[str, Any]:
    """The stage's DONE. `model_step` is the step whose policy the stage's model is."""
    return {
        "steps": state.step,
        "ended_by": "steps" if state.step >= ppo.steps else "patience",
        "kl_coef": state.kl_coef,
        "best_step": state.best_step,
        "best_score": state.best_score,
        "best_by": ppo.best_by,
        "worse_since": state.worse_since,
        "model_step": state.best_step if rolls_back(state, ppo) else state.step,
    }
