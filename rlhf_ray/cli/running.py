"""`rlhf-ray run` and the single stages: a run with a display, and its closing words."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from rlhf_ray.cli.display import Display, one_line, summary_table
from rlhf_ray.config import Recipe
from rlhf_ray.runs.run_folder import RunFolder


def run(
    recipe: Recipe,
    run_dir: str | Path | None = None,
    *,
    address: str | None = None,
    stages: list[str] | None = None,
    start_from: str | Path | None = None,
    console: Console | None = None,
) -> RunFolder:
    """Run the recipe's stages (default: all) in its run folder, from where that stands.

    start_from: another run folder, whose finished stages before PPO are taken over where this one has none yet.
    Raises UserError for a mistake in recipe, data or resources, StageStopped after Ctrl-C.
    """
    # Imported here: Ray and torch take seconds, and `--help` or a misspelt key should not wait for them.
    from rlhf_ray.actors import run_recipe

    return run_recipe.run(
        recipe, run_dir, address=address, stages=stages, start_from=start_from, display=lambda: Display(console)
    )


def closing_words(folder: RunFolder, console: Console) -> None:
    """The table, three sample pairs, where the report is, and the line that serves the model."""
    evaluation = folder.stage("evaluation").path
    summary = json.loads((evaluation / "summary.json").read_text())
    console.print()
    console.print(summary_table(summary))
    cap = summary.get("max_kl")
    if cap is not None and summary["kl"] > cap:
        console.print(
            f"[red]KL {summary['kl']:.1f} is above the recipe's cap of {cap:g} nats a response: raise ppo.kl_coef[/]"
        )
    samples = [json.loads(line) for line in (evaluation / "samples.jsonl").read_text().splitlines()[:3]]
    for sample in samples:
        console.print(f"\n[dim]prompt[/]     {escape(one_line(sample['prompt'], 200))}")
        for model, style in (("sft", "dim"), ("dpo", "dim"), ("ppo", "bold")):
            if model in sample:
                answer = one_line(response_of(sample, model), 240)
                console.print(f"[{style}]{model.upper()}[/]{judged(sample, model):>8}  {escape(answer)}")
    console.print(f"\nreport  {folder.report}", highlight=False, soft_wrap=True)
    console.print(f"serve   rlhf-ray serve {folder.path}", highlight=False, soft_wrap=True)


def judged(sample: dict, model: str) -> str:
    """The judge's score of the model's answer; nothing where there is no judge."""
    score = sample[model].get("judge") if isinstance(sample[model], dict) else None
    return "" if score is None else f"{score:.1f}"


def response_of(sample: dict, model: str) -> str:
    answer = sample[model]
    return answer["response"] if isinstance(answer, dict) else answer
