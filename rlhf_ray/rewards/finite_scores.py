"""Scores that are finite as the 32-bit floats that PPO computes with; else an error that names the sample.

A function's score is its author's error; that of a reward model stops the run as a broken machine would. No such score
reaches an update.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlhf_ray.errors import NotFinite, UserError
from rlhf_ray.messages import Scores
from rlhf_ray.models.control_tokens import shown

SHOWN = 200  # characters of a text in a message


class UserScore(UserError):
    """A score of the user's own function, plug-in or weights that is not finite. place: of the sample in the call."""

    place = 0


class ModelScore(NotFinite):
    """A reward model's score that is not finite."""

    place = 0


def sample_words(prompt: str, response: str, row: Mapping[str, Any] | None = None) -> str:
    """A sample as a message shows it."""
    return ", ".join(f"{name} {value!r}" for name, value in {"prompt": prompt, "response": response, **(row or {})}.items())


def as_scores(values: np.ndarray) -> np.ndarray:
    """As 32-bit floats; what they can't hold becomes infinite."""
    with np.errstate(over="ignore"):
        return values.astype(np.float32)


def check_finite(
    kind: type[UserScore] | type[ModelScore],
    source: str,
    values: np.ndarray,  # [B], as they came
    prompts: Sequence[str],
    responses: Sequence[str],
    columns: Mapping[str, Sequence[Any]] | None = None,
    *,
    remedy: str = "",
) -> np.ndarray:
    """The values as 32-bit floats. Raises `kind` with the first sample whose value is not finite in them.

    source: who scored, with its verb ("my_rewards:brevity returned"). columns: those that the scorer was given.
    """
    scores = as_scores(values)
    bad = np.flatnonzero(~np.isfinite(scores))
    if len(bad) == 0:
        return scores
    place = int(bad[0])
    row = {name: given[place] for name, given in (columns or {}).items()}
    value = float(values[place])
    overflow = ", which is infinite as a 32-bit float" if np.isfinite(value) else ""
    sample = sample_words(shown(prompts[place])[-SHOWN:], responses[place][:SHOWN], row)
    error = kind(f"{source} {value:g} for {sample}{overflow}{remedy and '; '}{remedy}")
    error.place = place
    raise error


def check_scores(scores: Scores, source: str, prompts: Sequence[str], responses: Sequence[str]) -> Scores:
    """What any scorer returned, a plug-in's too: every score and every term is finite."""
    for name, values in scores.terms.items():
        check_finite(UserScore, f"the reward '{name}' is", values, prompts, responses)
    check_finite(UserScore, source, scores.total, prompts, responses)
    return scores
