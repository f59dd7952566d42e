"""The models that an evaluation compares, as its summary.json and a line of its samples.jsonl name them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

OVER_SFT = "_over_sft"


def models_of_summary(summary: Mapping[str, Any]) -> list[str]:
    """SFT first, then PPO, then the other tuned models."""
    others = [key.removesuffix(OVER_SFT) for key in summary if key.endswith(OVER_SFT)]
    return [name for name in ("sft", "ppo", *others) if name in summary]


def other_tuned(summary: Mapping[str, Any]) -> list[str]:
    """The tuned models beside PPO's."""
    return [name for name in models_of_summary(summary) if name not in ("sft", "ppo")]


def over_sft(summary: Mapping[str, Any], model: str) -> Mapping[str, Any]:
    """How far the tuned model has gone from SFT and what it gained: win_rate, kl, difference, ratio. PPO's are at the top."""
    return summary if model == "ppo" else summary[f"{model}{OVER_SFT}"]


def title(model: str) -> str:
    return model.upper()


def asked(row: Mapping[str, Any]) -> str:
    """What the prompt of such a line asks: of a conversation, the user's last turn."""
    turns = row.get("messages") or []
    return next((turn["content"] for turn in reversed(turns) if turn["role"] == "user"), row["prompt"])
