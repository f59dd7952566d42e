"""The closing figures of a stage in a few words, for the line with which the terminal says that it is done."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

#: closing figure -> (its name, factor, decimals, unit, the count of what it was measured on, their name)
SHOWN = {
    "accuracy": ("accuracy", 100, 1, "\u00a0%", "pairs", "held-out pairs"),
    "pearson": ("correlation with people's scores", 1, 2, "", "eval_rows", "held-out rows"),
}


def closing_words(figures: Mapping[str, Any]) -> str:
    """ "accuracy 61.2 % (55.1 to 67.0) on 250 held-out pairs; max_minutes ended the training at step 30 of 400 ..."."""
    together = figures.get("ensemble", figures)
    found = [words for name in SHOWN if (words := _with_interval(together, name)) is not None][-1:]
    steps, planned = figures.get("steps"), figures.get("planned_steps")
    if steps is not None and planned is not None and steps < planned:
        found.append(f"max_minutes ended the training at step {steps} of {planned}" + _minutes(figures))
    return "; ".join(found)


def _minutes(figures: Mapping[str, Any]) -> str:
    training, measuring = figures.get("train_seconds"), figures.get("measure_seconds")
    if training is None or measuring is None:  # a plugin's stage
        return ""
    return f" ({training / 60:.1f} min of training, {measuring / 60:.1f} min of measuring)"


def _with_interval(figures: Mapping[str, Any], name: str) -> str | None:
    intervals = figures.get("intervals")
    if not isinstance(intervals, Mapping):
        return None
    interval = cast(Mapping[str, Mapping[str, float] | None], intervals).get(name)
    if interval is None:
        return None
    label, factor, decimals, unit, count, rows = SHOWN[name]
    mean, low, high = (f"{factor * interval[part]:.{decimals}f}" for part in ("mean", "low", "high"))
    return f"{label} {mean}{unit} ({low} to {high}) on {figures.get(count)} {rows}"
