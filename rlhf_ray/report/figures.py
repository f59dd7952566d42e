"""What the report shows of the evaluation and of the reward models: key figures, the models side by side, held-out figures."""

from __future__ import annotations

import numpy as np

from rlhf_ray.report import charts
from rlhf_ray.report.words import figure, flat, percent, shown
from rlhf_ray.tables.figures import shown_figures

MODELS = {"sft": "SFT", "ppo": "PPO", "dpo": "DPO"}  # those that the evaluation drew from; DPO where there is one
PAIR_MODELS = {"reward": "Reward model", "judge": "Judge", "dpo": "DPO's implicit reward"}

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
    cards = []
    rates = [(summary["win_rate"], "PPO over SFT")]
    if "dpo" in summary:
        rates += [(summary[f"{pair}_over_{other}"]["win_rate"], f"{pair.upper()} over {other.upper()}")
                  for pair, other in (("dpo", "sft"), ("ppo", "dpo"))]  # fmt: skip
    for rate, label, note in (
        (by[scorer], label, f"{models}, by {whom}")
        for by, models in rates
        for scorer, label, whom in (
            ("reward_model", "Win rate, reward", "what PPO was trained on"),
            ("judge", "Win rate, judge", "the independent judge"),
        )
    ):
        if rate is not None:
            cards.append(
                {
                    "label": label,
                    "value": percent(rate["mean"]),
                    "note": note,
                    "interval": f"{percent(rate['low'])[:-2]} to {percent(rate['high'])}",
                    "gauge": charts.gauge(rate, 0.5, 0.0, 1.0),
                }
            )
    for title, figures in (("", summary), (" (DPO)", summary.get("dpo_over_sft"))):
        if figures is None:
            continue
        kl = figures.get("kl_interval")
        cards.append(
            {
                "label": f"KL to SFT{title}",
                "value": charts.number(figures["kl"]),
                "note": "nats a response",
                "interval": f"{charts.number(kl['low'])} to {charts.number(kl['high'])}" if kl else "",
                "gauge": "",
            }
        )
    for key, label, note in (
        ("distinct_2", "Distinct-2, PPO / SFT", "variety kept; 1: all of it"),
        ("perplexity_independent", "Perplexity, PPO / SFT", "under the independent model"),
        ("length", "Length, PPO / SFT", "tokens a response"),
    ):
        ratio = summary.get("ratio", {}).get(key)
        if ratio is not None:
            cards.append(
                {
                    "label": label,
                    "value": charts.number(ratio["mean"]),
                    "note": note,
                    "interval": f"{charts.number(ratio['low'])} to {charts.number(ratio['high'])}",
                    "gauge": charts.gauge(ratio, 1.0, 0.0, 2.0),
                }
            )
    return cards


def table(summary: dict) -> list[dict]:
    """The models side by side, one row a figure; its cells are (value, difference from SFT, the difference's tone)."""
    rows = []
    compared = {"ppo": summary, "dpo": summary.get("dpo_over_sft", {})}
    for each in shown_figures(summary.get("ppo", {})):
        values = {name: summary[name].get(each.name) for name in MODELS if name in summary}
        if not values or None in values.values():
            continue
        cells = []
        for name, value in values.items():
            difference = compared.get(name, {}).get("difference", {}).get(each.name)
            words = figure(difference, each.percent) if name in compared else ""
            cells.append((figure(value, each.percent), words, _tone(difference, each.better)))
        rows.append(
            {
                "label": each.label,
                "unit": each.unit,
                "cells": cells,
                "plot": charts.intervals(list(values.values())),
            }
        )
    return rows


def _tone(difference: dict | None, better: int) -> str:
    """Whether its whole interval is good or bad news."""
    sign = 0 if difference is None else (difference["low"] > 0) - (difference["high"] < 0)
    return {1: "good", -1: "bad", 0: ""}[sign * better]


def histograms(samples: list[dict]) -> list[tuple[str, str]]:
    plots = []
    for key, label in (("score", "Reward-model score"), ("judge", "Judge's score")):
        scores = [[row[name].get(key) for name in MODELS if name in row] for row in samples]
        scores = [row for row in scores if None not in row]
        if len(scores) >= 20:
            plots.append((label, charts.histogram(np.array(scores, dtype=float).T, label)))
    return plots


def quality(closing: dict) -> list[tuple[str, list[str]]]:
    """Rows of the held-out figures of reward model, judge and DPO: (name, [value under each column])."""
    columns = [flat(closing[stage]) for stage in PAIR_MODELS if closing[stage]]
    # A figure measured on another set too ("openings.accuracy") stands under its own key.
    names = {
        name: QUALITY_NAMES[key] + (f" ({name.rpartition('.')[0]})" if "." in name else "")
        for key in QUALITY_NAMES
        for column in columns
        for name in column
        if name.rpartition(".")[2] == key
    }
    return [(label, [shown(name, column.get(name)) for column in columns]) for name, label in names.items()]


def calibrations(closing: dict) -> list[tuple[str, str]]:
    """Plots of DONE's "calibration": a list of {"predicted", "observed", "count"}."""
    plots = []
    for stage, title in PAIR_MODELS.items():
        bins = (closing[stage] or {}).get("calibration")
        if isinstance(bins, list):
            points = [(one["predicted"], one["observed"]) for one in bins if one["count"]]
            plots.append((title, charts.calibration(points)))
    return plots
