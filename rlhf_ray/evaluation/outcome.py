"""What an evaluation left in its folder, read back: summary.json and samples.jsonl.

Report, terminal and the pages of results/ read files that anybody may have edited, or that another version has written. So their
form is checked here, and what is wrong is one sentence with its place. The values come back as they stand in the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from rlhf_ray.errors import UserError
from rlhf_ray.runs.storage import read_lines, read_object

SUMMARY, SAMPLES = "summary.json", "samples.jsonl"
REMEDY = "delete the folder that it is in, and the next run evaluates again"


class _Part(BaseModel):
    """Other keys may stand beside these."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, frozen=True)


class _Figure(_Part):
    mean: float
    low: float
    high: float


Figures = dict[str, _Figure | None]


class _Rates(_Part):
    reward_model: _Figure | None
    judge: _Figure | None
    at_equal_length: Figures = {}

    @model_validator(mode="after")
    def _somebody_scored(self) -> Self:
        if self.reward_model is None and self.judge is None:
            raise ValueError("neither reward_model nor judge has a figure")
        return self


class _Over(_Part):
    """One model against another."""

    win_rate: _Rates


class _OverSft(_Over):
    kl: float
    kl_interval: _Figure | None
    difference: Figures
    ratio: Figures


class _Standing(_Part):
    above_chance: bool
    figure_in_words: str
    problems: list[str]


class _HeldOutVotes(_Part):
    pairs: int
    reward_model: _Figure | None = None
    judge: _Figure | None = None


class _Names(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    tuned: str
    has_sft: bool
    reward: str


class _ShownAs(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    label: str
    unit: str
    better: Literal[-1, 0, 1]
    percent: bool
    short: str | None


class _Sampling(_Part):
    temperature: float


class _Summary(_OverSft):
    sft: Figures
    ppo: Figures
    prompts: int
    seeds: list[int]
    sampling: _Sampling
    max_kl: float | None = None
    names: _Names = _Names(tuned="PPO", has_sft=True, reward="reward model")
    scorers: dict[str, _Standing | None] = {}
    held_out_votes: _HeldOutVotes | None = None
    shown_as: dict[str, _ShownAs] = {}
    definitions: dict[str, str] = {}
    missing: dict[str, str] = {}


class _Tuned(_Part):
    """Of a tuned model beside PPO's."""

    figures: Figures
    over_sft: _OverSft
    ppo_over: _Over


class _Answer(_Part):
    response: str
    score: float | None
    tokens: int
    ended: bool
    judge: float | None = None


class _Turn(_Part):
    role: str
    content: str


class _Sample(_Part):
    prompt: str
    seed: int
    messages: list[_Turn] | None = None
    sft: _Answer
    ppo: _Answer


def read_summary(folder: Path) -> dict[str, Any]:
    """summary.json of an evaluation's folder. UserError for a file that is gone, damaged, or of another form."""
    path = folder / SUMMARY
    found = read_object(path, REMEDY)
    _check(_Summary, found, str(path))
    for name in (key.removesuffix("_over_sft") for key in found if key.endswith("_over_sft")):
        parts = {"figures": found.get(name), "over_sft": found[f"{name}_over_sft"], "ppo_over": found.get(f"ppo_over_{name}")}
        _check(_Tuned, parts, f"{path} ({name})")
    return found


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """The lines of samples.jsonl; [] where there is none. UserError as `read_summary`."""
    path = folder / SAMPLES
    rows = read_lines(path)
    for number, row in enumerate(rows, start=1):
        _check(_Sample, row, f"{path}, sample {number}")
        for name in models_of_sample(row):
            _check(_Answer, row[name], f"{path}, sample {number}, {name}")
    return rows


def models_of_sample(row: Mapping[str, Any]) -> list[str]:
    """SFT first, then PPO, then the other tuned models: those whose response is in the line."""
    found = [name for name, part in row.items() if isinstance(part, dict)]
    return sorted(found, key=lambda name: {"sft": 0, "ppo": 1}.get(name, 2))


def _check(form: type[BaseModel], value: object, where: str) -> None:
    try:
        form.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        said = first["msg"].removeprefix("Value error, ")
        said = "is missing" if first["type"] == "missing" else f"{said[0].lower()}{said[1:]}"
        raise UserError(f"{where} is damaged, or of another version: {place or 'it'}: {said}; {REMEDY}") from None
