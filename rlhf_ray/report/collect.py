"""Record finished runs under results/: `python -m rlhf_ray.report.collect OUT RUN_DIR [RUN_DIR ...]`.

Each run (one per seed) leaves its resolved recipe, summary, metrics, first samples and report; OUT/README.md puts them side
by side, with each run's 95 % intervals and the mean and range over the runs. --models adds policy and reward model in
bfloat16, --adapter the policy as an adapter on the recipe's model.
"""

from __future__ import annotations

import argparse
import html
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import cast

import yaml

from rlhf_ray.config.recipe_file import load_recipe, path_fields, read_yaml
from rlhf_ray.errors import UserError
from rlhf_ray.evaluation.verdict import names_in
from rlhf_ray.report.models import models_of_summary, other_tuned, over_sft, title
from rlhf_ray.runs.metrics import read_metrics
from rlhf_ray.runs.run_folder import EVALUATE_AGAIN, RunFolder, environment_of
from rlhf_ray.runs.storage import read_object, write_atomically
from rlhf_ray.tables.figures import shown_figures

SAMPLES = 40
FILES = ("environment.json", "timings.json", "report.html", "events.jsonl")
OWN_MODELS = ("sft", "fluency", "model", "from_scratch")  # what these say in a recipe is not a folder


def collect(out: Path, runs: list[RunFolder], models: bool = False, rank: int | None = None) -> Path:
    """Write OUT from scratch and return its README.md. Raises UserError for a run that has no evaluation."""
    summaries = {}
    for run in runs:
        summary = run.path / "evaluation" / "summary.json"
        if not summary.exists():
            raise UserError(f"{run.path} has no evaluation; finish it with: rlhf-ray run RECIPE --run-dir {run.path}")
        seed = load_recipe(str(run.recipe)).seed
        if seed in summaries:
            raise UserError(f"{run.path} has seed {seed} like a run before it; give one run per seed")
        summaries[seed] = read_object(summary, EVALUATE_AGAIN)
        record(run, out / f"seed_{seed}")
    if models:
        save_models(runs[0], out)
    if rank is not None:
        save_policy_adapter(runs[0], out, rank)
    text = "\n".join(_readme(out.name, summaries, runs)) + "\n"
    write_atomically(out / "README.md", text)
    return out / "README.md"


def record(run: RunFolder, target: Path) -> None:
    """What is worth keeping of one run; of paths of the machine it ran on, the last part."""
    shorten = path_shortener(run)
    shutil.rmtree(target, ignore_errors=True)
    files = {name: run.path / name for name in FILES} | {"summary.json": run.path / "evaluation" / "summary.json"}
    for stage in run.stage_titles:
        folder = run.stage(stage)
        if folder.done and stage not in ("data", "evaluation"):
            files |= {f"{stage}.json": folder.done_file, f"{stage}_metrics.jsonl": folder.metrics}
    for name, file in files.items():
        if file.exists():
            write_atomically(target / name, shorten(file.read_text()))
    samples = [json.dumps(row, ensure_ascii=False) for row in read_metrics(run.path / "evaluation" / "samples.jsonl")[:SAMPLES]]
    write_atomically(target / "samples.jsonl", shorten("\n".join(samples) + "\n"))
    # Value by value, so that YAML puts quotes around a last part that needs them.
    recipe = _map_texts(read_yaml(str(run.recipe)), shorten)
    write_atomically(target / "recipe.yaml", yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))


def path_shortener(run: RunFolder) -> Callable[[str], str]:
    """What cuts the run's folder and every absolute path of its recipe to the last part, wherever they stand in a text."""
    recipe = load_recipe(str(run.recipe))
    arguments = [value for value in recipe.data.builder_args.values() if isinstance(value, str)]
    named = {str(Path(text)) for text in [*(text for _, text in path_fields(recipe)), *arguments]} | {str(run.path)}
    names = {}
    for path in (path for path in named if Path(path).is_absolute() and Path(path).name):
        name = Path(path).name
        name = f"./{name}" if name in OWN_MODELS else name
        for written in (str, html.escape, lambda text: json.dumps(text)[1:-1]):
            names[written(path)] = written(name)

    def shorten(text: str) -> str:
        for path in sorted(names, key=len, reverse=True):
            spaced = r"\s+".join(map(re.escape, path.split()))  # YAML breaks a long line at a space
            # Not the end of a longer path; "\n" is how JSON writes the end of a line.
            text = re.sub(rf"(?:(?<![\w./~-])|(?<=\\n)){spaced}(?![\w-])", lambda _, name=names[path]: name, text)
        return text

    return shorten


def _map_texts(value, change: Callable[[str], str]):
    if isinstance(value, dict):
        return {key: _map_texts(part, change) for key, part in value.items()}
    if isinstance(value, list):
        return [_map_texts(part, change) for part in value]
    return change(value) if isinstance(value, str) else value


def save_models(run: RunFolder, out: Path) -> None:
    """policy/ and reward/ in bfloat16."""
    import torch

    from rlhf_ray.models.load import load_causal_lm, load_reward_model
    from rlhf_ray.models.save import save_model
    from rlhf_ray.models.tokenizer import load_tokenizer

    shorten = path_shortener(run)
    for name, stage, load in (("policy", "ppo", load_causal_lm), ("reward", "reward", load_reward_model)):
        source = run.stage(stage).model
        card = shorten((source / "README.md").read_text())
        model = load(source)
        cast(torch.nn.Module, model).to(torch.bfloat16)  # transformers' own annotation of `to` has lost its `self`
        save_model(model, load_tokenizer(source), out / name, card)


def save_policy_adapter(run: RunFolder, out: Path, rank: int) -> None:
    """policy/ as an adapter on the recipe's model, whatever stages have changed it."""
    from rlhf_ray.models.difference import save_difference
    from rlhf_ray.models.load import load_causal_lm

    recipe = load_recipe(str(run.recipe))
    start = recipe.model.name_or_path
    if recipe.generation.stop or recipe.model.chat_template is not None:
        raise UserError("--adapter: an adapter holds no generation.stop and no model.chat_template, as this run has; use --models")
    if start == "from_scratch":
        raise UserError("--adapter needs a model that others have too, and this run's starts from random weights; use --models")
    models = load_causal_lm(start), load_causal_lm(run.stage("ppo").model)
    lost = save_difference(*models, rank, out / "policy", path_shortener(run)(start))
    print(f"policy/: an adapter of rank {rank}, which leaves out {lost:.2%} of the change")


def _readme(name: str, summaries: dict[int, dict], runs: list[RunFolder]) -> list[str]:
    environment = environment_of(runs[0])
    timings = [read_object(run.path / "timings.json", "run the same command again, which writes it") for run in runs]
    seeds = sorted(summaries)
    lines = [f"# {name}", "",
             f"{len(seeds)} run(s), seeds {', '.join(map(str, seeds))}, on {environment['cpus']} cores of {environment['cpu']}"
             f"{', ' + environment['gpus'][0] if environment['gpus'] else ''}. To repeat one: [results](../README.md#{name}); its "
             f"recipe, with all that was set, is in seed_{seeds[0]}/recipe.yaml. This page: "
             f"`python -m rlhf_ray.report.collect results/{name} runs/{name}-*`. Brackets: 95 % bootstrap intervals "
             "over the held-out prompts of one run.", ""]  # fmt: skip
    lines += ["| figure | model | " + " | ".join(f"seed {seed}" for seed in seeds) + " | mean (range) |",
              "|---|---|" + "---|" * (len(seeds) + 1)]  # fmt: skip
    models, told = models_of_summary(summaries[seeds[0]]), names_in(summaries[seeds[0]]).told
    pairs: list[tuple[str | None, str]] = [(None, "PPO over SFT")]
    for model in other_tuned(summaries[seeds[0]]):
        pairs += [(f"{model}_over_sft", f"{title(model)} over SFT"), (f"ppo_over_{model}", f"PPO over {title(model)}")]
    shown = shown_figures(summaries[seeds[0]]["ppo"], summaries[seeds[0]].get("shown_as", {}))
    titles = {each.name: each.short for each in shown if each.short is not None}
    for key, words in titles.items():
        for model in models:
            cells = [summaries[seed].get(model, {}).get(key) for seed in seeds]
            if all(cells):
                lines.append(_row(told(words), told(title(model)), cells))
    for key, words in (("judge", "win rate, judge"), ("reward_model", "win rate, reward model")):
        for place, who in pairs:
            parts = [summaries[seed] if place is None else summaries[seed].get(place) for seed in seeds]
            cells = [part["win_rate"].get(key) for part in parts if part]
            if len(cells) == len(seeds) and all(cells):
                lines.append(_row(told(f"**{words}**"), told(who), cells))
    for model in models[1:]:
        if all(model in summaries[seed] for seed in seeds):
            cells = [over_sft(summaries[seed], model)["kl_interval"] for seed in seeds]
            lines.append(_row("KL, nats per response", told(f"{title(model)} to SFT"), cells))
    ratios = [summaries[seed].get("ratio", {}).get("distinct_2") for seed in seeds]
    if all(ratios):
        lines.append(_row("distinct-2", told("PPO / SFT"), ratios))
    lines += ["", "Seconds by stage:", "", "| stage | " + " | ".join(f"seed {seed}" for seed in seeds) + " |",
              "|---|" + "---|" * len(seeds)]  # fmt: skip
    lines += [f"| {stage} | " + " | ".join(f"{part[stage]:.0f}" if stage in part else "" for part in timings) + " |"
              for stage in runs[0].stage_titles if any(stage in part for part in timings)]  # fmt: skip
    return lines


def _row(title: str, model: str, cells: list[dict]) -> str:
    means = [cell["mean"] for cell in cells]
    parts = [f"{cell['mean']:.3g} [{cell['low']:.3g}, {cell['high']:.3g}]" for cell in cells]
    spread = f"{sum(means) / len(means):.3g} ({min(means):.3g} to {max(means):.3g})"
    return f"| {title} | {model} | " + " | ".join([*parts, spread]) + " |"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m rlhf_ray.report.collect", description=str(__doc__).partition("\n")[0]
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument(
        "--models", action="store_true", help="also the first run's policy and reward model in bfloat16"
    )
    parser.add_argument("--adapter", type=int, metavar="RANK", help="also the first run's policy as an adapter of this rank")
    given = parser.parse_args(arguments)
    try:
        print(collect(given.out, [RunFolder(path.absolute()) for path in given.runs], given.models, given.adapter))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
