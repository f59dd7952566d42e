"""What the report shows of the evaluation and of the reward models: key figures, the models side by side, held-out figures."""

from __future__ import annotations

import numpy as np

from rlhf_ray.config.run_names import RunNames
from rlhf_ray.evaluation.outcome import models_of_sample
from rlhf_ray.evaluation.verdict import names_in
from rlhf_ray.report import charts
from rlhf_ray.report.formatting import between, figure, flat, percent, shown
from rlhf_ray.report.models import models_of_summary, other_tuned, over_sft, title
from rlhf_ray.tables.figures import shown_figures

QUALITY_NAMES = {  # figures of DONE that say how well replies are told apart; the others are under "closing figures"
    "pairs": "Held-out pairs",
    "accuracy": "Accuracy on held-out pairs",
    "longer_accuracy": "Accuracy of “always the longer”",
    "sign_accuracy": "Right side of the mean score",
    "chosen_longer_accuracy": "Accuracy where the longer was chosen",
    "chosen_longer_pairs": "Pairs in which the longer was chosen",
    "chosen_shorter_accuracy": "Accuracy where the shorter was chosen",
    "chosen_shorter_pairs": "Pairs in which the shorter was chosen",
    "length_pearson": "Pearson correlation with length",
    "length_spearman": "Spearman correlation with length",
    "disagreement": "Disagreement of the members",
    "ece": "Expected calibration error",
    "margin_mean": "Mean margin, chosen over rejected",
    "pearson": "Pearson correlation with people's scores",
    "spearman": "Spearman correlation with people's scores",
    "reward_mean": "Mean raw score of SFT samples",
    "reward_std": "Deviation of the raw scores of SFT samples",
}


def cards(summary: dict) -> list[dict]:
    """The key figures: label, value, interval, note, gauge."""
    if not summary:
        return []
    cards, told = [], names_in(summary).told
    rates = [(summary["win_rate"], "PPO over SFT")]
    for other in other_tuned(summary):
        rates += [(summary[f"{one}_over_{two}"]["win_rate"], f"{told(title(one))} over {told(title(two))}")
                  for one, two in ((other, "sft"), ("ppo", other))]  # fmt: skip
    for rate, at_equal_length, scorer, label, note in (
        (by[scorer], by.get("at_equal_length", {}), scorer, label, f"{models}, by {whom}")
        for by, models in rates
        for scorer, label, whom in (
            ("reward_model", "Win rate, reward", "what PPO was trained on"),
            ("judge", "Win rate, judge", "the independent judge"),
        )
    ):
        if rate is not None:
            level = at_equal_length.get(scorer)
            cards.append(
                {
                    "label": label,
                    "value": percent(rate["mean"]),
                    "note": told(note),
                    "interval": between(rate, " %") + (f"; at equal length {percent(level['mean'])}" if level else ""),
                    "gauge": charts.gauge(rate, 0.5, 0.0, 1.0),
                }
            )
    for model in ("ppo", *other_tuned(summary)):
        figures = over_sft(summary, model)
        kl = figures.get("kl_interval")
        cards.append(
            {
                "label": told("KL to SFT") + ("" if model == "ppo" else f" ({title(model)})"),
                "value": charts.number(figures["kl"]),
                "note": "nats per response",
                "interval": between(kl) if kl else "",
                "gauge": "",
            }
        )
    for key, label, note in (
        ("distinct_2", "Distinct-2, PPO / SFT", "variety kept; 1: all of it"),
        ("perplexity_independent", "Perplexity, PPO / SFT", "under the independent model"),
        ("length", "Length, PPO / SFT", "tokens per response"),
    ):
        ratio = summary.get("ratio", {}).get(key)
        if ratio is not None:
            cards.append(
                {
                    "label": told(label),
                    "value": charts.number(ratio["mean"]),
                    "note": note,
                    "interval": between(ratio),
                    "gauge": charts.gauge(ratio, 1.0, 0.0, 2.0),
                }
            )
    return cards


def table(summary: dict) -> list[dict]:
    """The models side by side, one row per figure; its cells are (value, difference from SFT, the difference's tone)."""
    rows, told = [], names_in(summary).told
    models = models_of_summary(summary)
    for each in shown_figures(summary.get("ppo", {}), summary.get("shown_as", {})):
        values = {name: summary[name].get(each.name) for name in models}
        if not values or None in values.values():
            continue
        cells = []
        for name, value in values.items():
            difference = None if name == "sft" else over_sft(summary, name).get("difference", {}).get(each.name)
            words = "" if name == "sft" else figure(difference, each.percent)
            cells.append((figure(value, each.percent), words, _tone(difference, each.better)))
        rows.append(
            {
                "label": told(each.label),
                "unit": told(each.unit),
                "cells": cells,
                "plot": charts.intervals(list(values.values())),
            }
        )
    return rows


def _tone(difference: dict | None, better: int) -> str:
    """Whether its whole interval is good or bad news."""
    sign = 0 if difference is None else (difference["low"] > 0) - (difference["high"] < 0)
    return {1: "good", -1: "bad", 0: ""}[sign * better]


def histograms(samples: list[dict], names: RunNames) -> list[tuple[str, str]]:
    plots = []
    for key, label in (("score", names.told("Reward-model score")), ("judge", "Judge's score")):
        scores = [[row[name].get(key) for name in models_of_sample(row)] for row in samples]
        scores = [row for row in scores if None not in row]
        if len(scores) >= 20:
            plots.append((label, charts.histogram(list(np.array(scores, dtype=float).T), label)))
    return plots


def quality(closing: dict, pairs: dict[str, str], names: RunNames) -> list[tuple[str, list[str]]]:
    """Rows of the held-out figures of reward model, judge and DPO: (name, [value under each column]).

    pairs: stage -> the title of its column, of those that are done
    """
    columns = [flat(closing[stage]) for stage in pairs]
    # A figure measured on another set too ("openings.accuracy") stands under its own key.
    labels = {
        name: names.told(QUALITY_NAMES[key]) + (f" ({name.rpartition('.')[0]})" if "." in name else "")
        for key in QUALITY_NAMES
        for column in columns
        for name in column
        if name.rpartition(".")[2] == key
    }
    return [(label, [_with_interval(name, column) for column in columns]) for name, label in labels.items()]


def _with_interval(name: str, column: dict) -> str:
    """A figure of DONE with its interval, where it has one: that of `ensemble.accuracy` is `ensemble.intervals.accuracy`."""
    prefix, dot, own = name.rpartition(".")
    ends = {part: column.get(f"{prefix}{dot}intervals.{own}.{part}") for part in ("mean", "low", "high")}
    known = all(isinstance(value, (int, float)) for value in ends.values())
    return figure(ends, "accuracy" in own) if known else shown(name, column.get(name))


def calibrations(closing: dict, pairs: dict[str, str]) -> list[tuple[str, str]]:
    """Plots of DONE's "calibration": a list of {"predicted", "observed", "count"}."""
    plots = []
    for stage, words in pairs.items():
        bins = closing[stage].get("calibration")
        if isinstance(bins, list):
            points = [point for one in bins if (point := _point(one)) is not None]
            plots.append((words, charts.calibration(points)))
    return plots


def _point(one: object) -> tuple[float, float] | None:
    """None for a bin without a pair, and for what is no bin."""
    if not isinstance(one, dict) or not one.get("count"):
        return None
    predicted, observed = one.get("predicted"), one.get("observed")
    return (predicted, observed) if isinstance(predicted, (int, float)) and isinstance(observed, (int, float)) else None
