"""report.html: one self-contained page from whatever a run folder holds so far.

It shows the files of the run folder and computes no figure of its own. Texts in it are written by models and strangers:
the template escapes everything (autoescape), and its Content-Security-Policy allows no script at all.
"""

from __future__ import annotations

from pathlib import Path

import jinja2

from rlhf_ray.config.recipe_file import read_yaml
from rlhf_ray.config.run_names import RunNames, names_of
from rlhf_ray.config.stage_table import ALWAYS
from rlhf_ray.errors import UserError
from rlhf_ray.evaluation.outcome import SUMMARY, models_of_sample, read_samples, read_summary
from rlhf_ray.evaluation.verdict import names_in, verdict, warnings
from rlhf_ray.report import charts, key_figures
from rlhf_ray.report import curves as report_curves
from rlhf_ray.report.formatting import duration, figure, flat, percent, shown
from rlhf_ray.report.models import models_of_summary, title
from rlhf_ray.report.trait_changes import what_differs, yes_no_traits
from rlhf_ray.rounds.rounds_table import HEADINGS, rounds_table
from rlhf_ray.runs.metrics import read_metrics
from rlhf_ray.runs.run_folder import RunFolder, timings_of
from rlhf_ray.runs.storage import read_lines, read_object, write_atomically

TEMPLATE = Path(__file__).with_name("template.html")
WORST = 3  # samples shown where PPO lost most
EVENTS = 200  # latest events shown
#: of PPO's closing figures, those that say how it ended
ENDED = {"model_step", "steps", "ended_by", "best_by", "best_score", "best_step", "worse_since"}


def write_report(folder: RunFolder) -> Path:
    """Write RUN/report.html and return its path."""
    write_atomically(folder.report, render(folder))
    return folder.report


def render(folder: RunFolder) -> str:
    """The page as text."""
    recipe = _recipe(folder)
    evaluation = folder.stage("evaluation").path
    summary = read_summary(evaluation) if (evaluation / SUMMARY).exists() else {}
    samples = read_samples(evaluation)
    names = names_in(summary) if "names" in summary else names_of(recipe)
    if summary:
        summary |= {"names": names.to_json()}
    titles = {stage: names.told(words) if stage == "ppo" else words for stage, words in folder.stage_titles.items()}
    metrics = {stage: read_metrics(folder.stage(stage).metrics) for stage in titles}
    closing = {stage: folder.stage(stage).summary() if folder.stage(stage).done else None for stage in titles}
    stages = _stages(folder, recipe, metrics, closing, titles)
    pairs = {stage: words for stage, words in folder.pair_titles.items() if closing.get(stage)}
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": charts.number, "percent": percent, "figure": figure, "duration": duration}
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        name=recipe.get("name", folder.path.name),
        recipe=recipe,
        stages=stages,
        verdict=verdict(summary, stages),
        warnings=warnings(summary),
        ended=names.told(_ended(closing["ppo"])),
        ppo=titles["ppo"],
        told=names.told,
        cards=key_figures.cards(summary),
        models=[names.told(title(model)) for model in models_of_summary(summary)],
        rows=key_figures.table(summary),
        summary=summary,
        missing=summary.get("missing", {}),
        definitions=summary.get("definitions", {}),
        histograms=key_figures.histograms(samples, names),
        curves=[(titles[stage], *report_curves.of_stage(stage, rows, names)) for stage, rows in metrics.items() if rows],
        rounds=rounds_table(folder),
        round_headings=HEADINGS,
        quality=key_figures.quality(closing, pairs, names),
        quality_columns=list(pairs.values()),
        calibrations=key_figures.calibrations(closing, pairs),
        samples=_shown(samples, recipe, names),
        closing=_closing(titles, closing),
        events=[_event(row) for row in read_lines(folder.events)[-EVENTS:][::-1]],
        environment=flat(_environment(folder)),
        recipe_text=folder.recipe.read_text(encoding="utf-8") if folder.recipe.exists() else "",
    )


def _recipe(folder: RunFolder) -> dict:
    """The recipe as its file holds it: a plugin that it names need not be here."""
    found = read_yaml(str(folder.recipe)) if folder.recipe.exists() else {}
    ppo, evaluation = found.get("ppo") or {}, found.get("evaluation") or {}
    rewards = ppo.get("rewards") or {} if isinstance(ppo, dict) else None
    sound = isinstance(rewards, dict) and all(isinstance(term, dict) for term in rewards.values())
    if not sound or not isinstance(evaluation, dict) or not isinstance(evaluation.get("samples", 0), int):
        raise UserError(f"{folder.recipe} is damaged: its ppo or evaluation is of another form; write the run's recipe there again")
    return found | {"evaluation": evaluation}


def _environment(folder: RunFolder) -> dict:
    path = folder.path / "environment.json"
    return read_object(path, "delete it, and the report leaves it out") if path.exists() else {}


def _event(row: dict) -> dict:
    """With the keys that the page shows; a line that lacks one, or holds something else there, keeps the others."""
    told = {key: str(row.get(key, "–")) for key in ("time", "what", "done")}
    cost = row.get("cost_s")
    return told | {"cost_s": cost if isinstance(cost, (int, float)) else None}


def _stages(folder: RunFolder, recipe: dict, metrics: dict, closing: dict, titles: dict[str, str]) -> list[dict]:
    """One row per stage that the recipe has: its state (done, running, waiting), last step and time."""
    rows, timings = [], timings_of(folder)
    for stage, name in titles.items():
        begun = folder.stage(stage).path.exists()
        if stage not in ALWAYS and recipe.get(stage) is None and not begun:
            continue
        done, steps = closing[stage] is not None, metrics[stage]
        seconds = timings.get(stage, (closing[stage] or {}).get("seconds"))
        rows.append(
            {
                "key": stage,
                "name": name,
                "state": "done" if done else "begun" if begun else "waiting",
                "step": steps[-1]["step"] if steps else None,
                "seconds": seconds if isinstance(seconds, (int, float)) else None,
            }
        )
    longest = max((row["seconds"] or 0 for row in rows), default=0) or 1
    return [row | {"share": 100 * (row["seconds"] or 0) / longest} for row in rows]


def _ended(ppo: dict | None) -> str:
    """Why PPO ended, and which step's policy it left, where that is not simply the last one's."""
    if not ppo or not ppo.keys() >= ENDED or (ppo["model_step"] == ppo["steps"] and ppo["ended_by"] == "steps"):
        return ""
    what = "judge's score" if ppo["best_by"] == "judge" else "score"
    words = f"PPO ended after step {ppo['steps']}"
    if ppo["ended_by"] == "patience":
        words += f", because {ppo['worse_since']} evaluations in a row found no better held-out {what}"
    best = f"{charts.number(ppo['best_score'])} at step {ppo['best_step']}"
    if ppo["model_step"] == ppo["steps"]:
        return f"{words}. Its model is that of the last step; the best {what} was {best}."
    return f"{words}. Its model is that of step {ppo['model_step']}, rolled back to the best held-out {what}: {best}."


def _closing(titles: dict[str, str], closing: dict) -> list[tuple[str, list[tuple[str, str]]]]:
    """Every stage's DONE as rows of (name, value), without the evaluation's: the page shows that in full."""
    return [
        (titles[stage], [(name, shown(name, value)) for name, value in flat(figures).items()])
        for stage, figures in closing.items()
        if figures and stage != "evaluation"
    ]


def _shown(samples: list[dict], recipe: dict, names: RunNames) -> dict[str, list[dict]]:
    """The first prompts (nobody chose them), and those where PPO lost most by the judge, else by the score."""
    count = recipe.get("evaluation", {}).get("samples", 12)
    first_seed = [row for row in samples if row["seed"] == samples[0]["seed"]]
    key = "judge" if first_seed and first_seed[0]["sft"].get("judge") is not None else "score"
    rest = [row for row in first_seed[count:] if row["ppo"].get(key) is not None and row["sft"].get(key) is not None]
    worst = sorted(rest, key=lambda row: row["ppo"][key] - row["sft"][key])[:WORST]
    worst = [row for row in worst if row["ppo"][key] < row["sft"][key]]
    parts = {"first": first_seed[:count], "worst": worst}
    told: set[str] = set()  # system prompts that stand above already
    yes_no = yes_no_traits(samples)
    return {name: [{"turns": _turns(row, told), "prompt": row["prompt"], "replies": _replies(row, names),
                    "why": what_differs(row["sft"], row["ppo"], yes_no)} for row in rows]
            for name, rows in parts.items()}  # fmt: skip


def _turns(row: dict, told: set[str]) -> list[tuple[str, str]]:
    """(role, text) of each turn of a conversation; none for a plain prompt. A system prompt is shown once on the page."""
    turns = [(message["role"], message["content"]) for message in row.get("messages") or []]
    shown_turns = [(role, text if role != "system" or text not in told else "(as above)") for role, text in turns]
    told |= {text for role, text in turns if role == "system"}
    return shown_turns


def _replies(row: dict, names: RunNames) -> list[dict]:
    """The models' answers in a row of samples.jsonl, each with its title, colour and the scorers by which it is the best."""
    answers = [(names.told(title(model)), row[model]) for model in models_of_sample(row)]

    def best(answer: dict, scorer: str) -> bool:
        scores = [other.get(scorer) for _, other in answers if other is not answer]
        return answer.get(scorer) is not None and all(one is not None and answer[scorer] > one for one in scores)

    return [
        {
            "who": who,
            "tone": f"m{i}",
            "answer": answer,
            "best": [key for key in ("score", "judge") if best(answer, key)],
        }
        for i, (who, answer) in enumerate(answers)
    ]
