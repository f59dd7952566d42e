"""report.html: one self-contained page from whatever a run folder holds so far.

It shows the files of the run folder and computes no figure of its own. Texts in it are written by models and strangers:
the template escapes everything (autoescape), and its Content-Security-Policy allows no script at all.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import jinja2
import numpy as np
import yaml

from rlhf_ray.evaluation import charts, report_curves
from rlhf_ray.evaluation.verdict import verdict, warnings
from rlhf_ray.metrics import read_metrics
from rlhf_ray.run_folder import STAGES, RunFolder, write_atomically

TEMPLATE = Path(__file__).with_name("report_template.html")
STAGE_NAMES = {
    "data": "Data",
    "sft": "SFT",
    "fluency": "Fluency model",
    "reward": "Reward model",
    "judge": "Judge",
    "dpo": "DPO",
    "ppo": "PPO",
    "evaluation": "Evaluation",
}
OPTIONAL_STAGES = ("fluency", "judge", "sft", "reward", "dpo")
MODELS = {"sft": "SFT", "ppo": "PPO", "dpo": "DPO"}  # those that the evaluation drew from; DPO where there is one
PAIR_MODELS = {"reward": "Reward model", "judge": "Judge", "dpo": "DPO's implicit reward"}
WORST = 3  # samples shown where PPO lost most
EVENTS = 200  # latest events shown

# key of summary.json: (label, unit or explanation, percent?, which direction is better: 1, -1, or 0 for neither)
FIGURES = {
    "score": ("Reward-model score", "deviations of the SFT model's scores", False, 1),
    "disagreement": ("Disagreement", "deviation over the ensemble's reward models", False, 0),
    "score_length_corr": ("Score with length", "correlation over responses", False, 0),
    "judge": ("Judge's score", "independent of the reward model", False, 1),
    "judge_positive": ("Judged positive", "share above the recipe's threshold", True, 1),
    "perplexity": ("Perplexity, SFT model", "of the responses given their prompts", False, 0),
    "perplexity_independent": ("Perplexity, independent model", "a separately seeded language model", False, -1),
    "relevance": ("Relevance", "nats a token, own prompt against another's", False, 1),
    "retrieval_accuracy": ("Own prompt likelier", "share of responses; 50 % is chance", True, 1),
    "length": ("Length", "tokens, EOS included", False, 0),
    "eos_rate": ("Ended by itself", "share of responses", True, 1),
    "distinct_1": ("Distinct-1", "different words / all words", False, 1),
    "distinct_2": ("Distinct-2", "different word pairs / all pairs", False, 1),
    "distinct_3": ("Distinct-3", "different word triples / all triples", False, 1),
    "repetition": ("Repetition", "4-grams said before in the same response", True, -1),
}
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


def write_report(folder: RunFolder) -> Path:
    """Write RUN/report.html and return its path."""
    write_atomically(folder.report, render(folder))
    return folder.report


def render(folder: RunFolder) -> str:
    """The page as text."""
    recipe = yaml.safe_load(folder.recipe.read_text()) if folder.recipe.exists() else {}
    summary = _json(folder.stage("evaluation").path / "summary.json")
    samples = read_metrics(folder.stage("evaluation").path / "samples.jsonl")
    metrics = {stage: read_metrics(folder.stage(stage).metrics) for stage in STAGES}
    closing = {stage: folder.stage(stage).summary() if folder.stage(stage).done else None for stage in STAGES}
    stages = _stages(folder, recipe, metrics, closing)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": charts.number, "percent": percent, "figure": figure, "duration": duration}
    return environment.from_string(TEMPLATE.read_text()).render(
        name=recipe.get("name", folder.path.name),
        recipe=recipe,
        stages=stages,
        verdict=verdict(summary, stages),
        warnings=warnings(summary),
        ended=_ended(closing["ppo"]),
        cards=_cards(summary),
        models=[title for name, title in MODELS.items() if name in summary],
        rows=_table(summary),
        summary=summary,
        missing=summary.get("missing", {}),
        definitions=summary.get("definitions", {}),
        histograms=_histograms(samples),
        curves=[(STAGE_NAMES[stage], *report_curves.of_stage(stage, rows)) for stage, rows in metrics.items() if rows],
        quality=_quality(closing),
        quality_columns=[title for stage, title in PAIR_MODELS.items() if closing[stage]],
        calibrations=_calibrations(closing),
        samples=_shown(samples, recipe),
        closing=_closing(closing),
        events=read_metrics(folder.events)[-EVENTS:][::-1],
        environment=_flat(_json(folder.path / "environment.json")),
        recipe_text=folder.recipe.read_text() if folder.recipe.exists() else "",
    )


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %".replace("-", "−")


def figure(value: dict | None, as_percent: bool = False) -> str:
    """ "1.23 (1.10 to 1.36)": as many decimals as the interval's width makes worth reading."""
    if value is None:
        return "–"
    scale, unit = (100, " %") if as_percent else (1, "")
    mean, low, high = (scale * value[part] for part in ("mean", "low", "high"))
    width = high - low
    decimals = min(max(1 - math.floor(math.log10(width)), 0), 6) if width > 0 else 2
    mean, low, high = (f"{part:,.{decimals}f}".replace("-", "−") for part in (mean, low, high))
    return f"{mean}{unit} ({low} to {high})"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s" if seconds < 10 else f"{rest} s"


def _json(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


def _stages(folder: RunFolder, recipe: dict, metrics: dict, closing: dict) -> list[dict]:
    """One row a stage that the recipe has: its state (done, running, waiting), last step and time."""
    rows, timings = [], _json(folder.path / "timings.json")
    for stage in STAGES:
        begun = folder.stage(stage).path.exists()
        if stage in OPTIONAL_STAGES and recipe.get(stage) is None and not begun:
            continue
        done, steps = closing[stage] is not None, metrics[stage]
        seconds = timings.get(stage, (closing[stage] or {}).get("seconds"))
        rows.append(
            {
                "key": stage,
                "name": STAGE_NAMES[stage],
                "state": "done" if done else "begun" if begun else "waiting",
                "step": steps[-1]["step"] if steps else None,
                "seconds": seconds if isinstance(seconds, (int, float)) else None,
            }
        )
    longest = max((row["seconds"] or 0 for row in rows), default=0) or 1
    return [row | {"share": 100 * (row["seconds"] or 0) / longest} for row in rows]


def _cards(summary: dict) -> list[dict]:
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


def _table(summary: dict) -> list[dict]:
    """The models side by side, one row a figure; its cells are (value, difference from SFT, the difference's tone)."""
    rows = []
    compared = {"ppo": summary, "dpo": summary.get("dpo_over_sft", {})}
    terms = {
        key: (f"Reward “{key.removeprefix('score/')}”", "before its weight", False, 0)
        for key in summary.get("ppo", {})
        if key.startswith("score/")
    }
    for key, (label, unit, as_percent, better) in (FIGURES | terms).items():
        values = {name: summary[name].get(key) for name in MODELS if name in summary}
        if not values or None in values.values():
            continue
        cells = []
        for name, value in values.items():
            difference = compared.get(name, {}).get("difference", {}).get(key)
            words = figure(difference, as_percent) if name in compared else ""
            cells.append((figure(value, as_percent), words, _tone(difference, better)))
        rows.append(
            {
                "label": label,
                "unit": unit,
                "cells": cells,
                "plot": charts.intervals(list(values.values())),
            }
        )
    return rows


def _tone(difference: dict | None, better: int) -> str:
    """Whether its whole interval is good or bad news."""
    sign = 0 if difference is None else (difference["low"] > 0) - (difference["high"] < 0)
    return {1: "good", -1: "bad", 0: ""}[sign * better]


def _histograms(samples: list[dict]) -> list[tuple[str, str]]:
    plots = []
    for key, label in (("score", "Reward-model score"), ("judge", "Judge's score")):
        scores = [[row[name].get(key) for name in MODELS if name in row] for row in samples]
        scores = [row for row in scores if None not in row]
        if len(scores) >= 20:
            plots.append((label, charts.histogram(np.array(scores, dtype=float).T, label)))
    return plots


def _quality(closing: dict) -> list[tuple[str, list[str]]]:
    """Rows of the held-out figures of reward model, judge and DPO: (name, [value under each column])."""
    columns = [_flat(closing[stage]) for stage in PAIR_MODELS if closing[stage]]
    # A figure measured on another set too ("openings.accuracy") stands under its own key.
    names = {
        name: QUALITY_NAMES[key] + (f" ({name.rpartition('.')[0]})" if "." in name else "")
        for key in QUALITY_NAMES
        for column in columns
        for name in column
        if name.rpartition(".")[2] == key
    }
    return [(label, [_show(name, column.get(name)) for column in columns]) for name, label in names.items()]


def _ended(ppo: dict | None) -> str:
    """Why PPO ended, and which step's policy it left, where that is not simply the last one's."""
    if not ppo or "model_step" not in ppo or (ppo["model_step"] == ppo["steps"] and ppo["ended_by"] == "steps"):
        return ""
    what = "judge's score" if ppo["best_by"] == "judge" else "score"
    words = f"PPO ended after step {ppo['steps']}"
    if ppo["ended_by"] == "patience":
        words += f", because {ppo['worse_since']} evaluations in a row found no better held-out {what}"
    best = f"{charts.number(ppo['best_score'])} at step {ppo['best_step']}"
    if ppo["model_step"] == ppo["steps"]:
        return f"{words}. Its model is that of the last step; the best {what} was {best}."
    return f"{words}. Its model is that of step {ppo['model_step']}, rolled back to the best held-out {what}: {best}."


def _closing(closing: dict) -> list[tuple[str, list[tuple[str, str]]]]:
    """Every stage's DONE as rows of (name, value), without the evaluation's: the page shows that in full."""
    return [
        (STAGE_NAMES[stage], [(name, _show(name, value)) for name, value in _flat(figures).items()])
        for stage, figures in closing.items()
        if figures and stage != "evaluation"
    ]


def _show(name: str, value) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if "accuracy" in name and 0 <= value <= 1:
        return percent(value)
    if name.endswith("seconds"):
        return duration(value)
    return f"{value:,}" if isinstance(value, int) else charts.number(value)


def _calibrations(closing: dict) -> list[tuple[str, str]]:
    """Plots of DONE's "calibration": a list of {"predicted", "observed", "count"}."""
    plots = []
    for stage, title in PAIR_MODELS.items():
        bins = (closing[stage] or {}).get("calibration")
        if isinstance(bins, list):
            points = [(one["predicted"], one["observed"]) for one in bins if one["count"]]
            plots.append((title, charts.calibration(points)))
    return plots


def _shown(samples: list[dict], recipe: dict) -> dict[str, list[dict]]:
    """The first prompts (nobody chose them), and those where PPO lost most by the judge, else by the score."""
    count = recipe.get("evaluation", {}).get("samples", 12)
    first_seed = [row for row in samples if row["seed"] == samples[0]["seed"]]
    key = "judge" if first_seed and first_seed[0]["sft"].get("judge") is not None else "score"
    rest = [row for row in first_seed[count:] if row["ppo"].get(key) is not None and row["sft"].get(key) is not None]
    worst = sorted(rest, key=lambda row: row["ppo"][key] - row["sft"][key])[:WORST]
    worst = [row for row in worst if row["ppo"][key] < row["sft"][key]]
    return {name: [{"prompt": row["prompt"], "replies": _replies(row)} for row in rows]
            for name, rows in (("first", first_seed[:count]), ("worst", worst))}  # fmt: skip


def _replies(row: dict) -> list[dict]:
    """The models' answers in a row of samples.jsonl, each with its title, colour and the scorers by which it is the best."""
    answers = [(title, row[name]) for name, title in MODELS.items() if name in row]

    def best(answer: dict, scorer: str) -> bool:
        scores = [other.get(scorer) for _, other in answers if other is not answer]
        return answer.get(scorer) is not None and all(one is not None and answer[scorer] > one for one in scores)

    return [
        {
            "who": title,
            "tone": f"m{i}",
            "answer": answer,
            "best": [key for key in ("score", "judge") if best(answer, key)],
        }
        for i, (title, answer) in enumerate(answers)
    ]


def _flat(value: dict, prefix: str = "") -> dict:
    """{"a": {"b": 1}} -> {"a.b": 1}; lists of plain values become one line, other lists are left out."""
    out = {}
    for name, inner in value.items():
        if isinstance(inner, dict):
            out |= _flat(inner, f"{prefix}{name}.")
        elif isinstance(inner, list):
            if all(not isinstance(one, (dict, list)) for one in inner):
                out[prefix + name] = ", ".join(map(str, inner))
        else:
            out[prefix + name] = inner
    return out
