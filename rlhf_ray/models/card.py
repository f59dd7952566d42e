"""README.md of a saved model: what it is, how it was made, how well it did."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from rlhf_ray.config import Recipe
from rlhf_ray.config.stage_table import STAGES


def model_card(recipe: Recipe, stage: str, figures: Mapping[str, object]) -> str:
    """Markdown with the front matter that the hub reads. `figures` are shown as they are, numbers to four digits."""
    kind = STAGES[stage].model
    assert kind is not None, f"the stage '{stage}' has no model"
    base = _shown(recipe.model.name_or_path)
    front = ["---", "library_name: transformers", f"pipeline_tag: {kind.task}"]
    on_hub = not recipe.model.is_from_scratch and base == recipe.model.name_or_path
    front += [f"base_model: {base}"] if on_hub else []
    front += ["tags:", "- rlhf", f"- {stage}", "---"]
    origin = (
        f"random weights ({recipe.model.from_scratch.architecture}, {recipe.model.from_scratch.layers} layers, "
        f"width {recipe.model.from_scratch.width})"
        if recipe.model.is_from_scratch
        else f"`{base}`" if on_hub else f"the local model folder `{base}`"
    )
    rows = [f"| {name} | {_show(value)} |" for name, value in _with_intervals(figures).items()]
    table = ["| figure | value |", "|---|---|", *rows] if rows else ["No figures were recorded."]
    section = recipe.section(stage)
    settings = json.dumps(_without_paths(section.model_dump(mode="json") if section is not None else {}), indent=2)
    notes = []
    if kind.task == "text-classification":
        notes = [
            "Scores are `(logit - reward_mean) / reward_std` with the two numbers in config.json, where it has them.\n",
        ]
    return "\n".join([
        *front, "",
        f"# {recipe.name}: {stage}", "",
        f"This is {kind.words}. It was made by rlhf_ray from {origin}, seed {recipe.seed}.", "",
        *notes,
        "A sequence is the prompt's tokens, the response's tokens, and EOS.", "",
        "## Figures", "", *table, "",
        f"## Settings of the stage `{stage}`", "", "```json", settings, "```", "",
        "A model of this kind repeats what is wrong in its data and makes up facts; measure before you rely on it.", "",
    ])  # fmt: skip


def _shown(model: str) -> str:
    """The hub's name of a model; of a folder on this machine, its last part: a path means nothing to others."""
    return Path(model).name if model.startswith(("/", ".", "~")) or Path(model).exists() else model


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_paths(part) for name, part in cast(dict[str, Any], value).items()}
    is_path = isinstance(value, str) and value.startswith(("/", "~/", "./", "../")) and Path(value).name != ""
    return _shown(value) if is_path else value


def _with_intervals(figures: Mapping[str, object]) -> dict[str, object]:
    """Each figure that has a 95 % interval (under `intervals`) as "0.612 (0.551 to 0.67)"."""
    intervals = figures.get("intervals")
    shown = {name: value for name, value in figures.items() if name != "intervals"}
    if isinstance(intervals, Mapping):
        for name, each in cast(Mapping[str, Mapping[str, float] | None], intervals).items():
            if name in shown and each is not None:
                shown[name] = f"{each['mean']:.4g} ({each['low']:.3g} to {each['high']:.3g})"
    return shown


def _show(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
