"""`rlhf-ray run` and the single stages: a run with a display, and its closing words."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape

from rlhf_ray.cli.display import Display, one_line, summary_table
from rlhf_ray.config import Recipe
from rlhf_ray.config.recipe_file import load_recipe
from rlhf_ray.config.run_names import RunNames, names_of
from rlhf_ray.config.stage_table import STAGES, all_needs_of
from rlhf_ray.errors import UserError
from rlhf_ray.evaluation.outcome import models_of_sample, read_samples, read_summary
from rlhf_ray.evaluation.verdict import names_in, verdict, warnings
from rlhf_ray.report.models import asked
from rlhf_ray.report.trait_changes import what_differs, yes_no_traits
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
        recipe, run_dir, address=address, stages=stages, start_from=start_from,
        display=lambda: Display(console, names_of(recipe.model_dump(mode="json"))),
    )


def run_some(
    stages: list[str],
    recipe_name: str,
    overrides: list[str] | None,
    run_dir: str | None,
    *,
    address: str | None,
    start_from: str | None,
    console: Console,
    called: str,
) -> None:
    """Run those of the stages that the recipe has, and first what they need; print where their results are.

    called: what the user asked for, for the message where there are none.
    """
    recipe = load_recipe(recipe_name, overrides)
    own = [name for name in stages if name in recipe.stages]
    if not own:
        known = called in STAGES or any(stage.command == called for stage in STAGES.values())
        why = "its section is null" if known else f"it has {', '.join(recipe.stages)}"
        raise UserError(f"the recipe '{recipe.name}' has no stage '{called}': {why}")
    needed = {other for name in own if STAGES[name].brings_needs for other in all_needs_of(recipe, name)}
    wanted = [name for name in recipe.stages if name in needed or name in own]
    folder = run(recipe, run_dir, address=address, stages=wanted, start_from=start_from, console=console)
    if "evaluation" in own:
        closing_words(folder, console)
        return
    for name in own:
        console.print(f"{folder.given}/{name}", highlight=False, soft_wrap=True)


def closing_words(folder: RunFolder, console: Console) -> None:
    """The table, three sample pairs, where the report is, and the line that serves the model."""
    evaluation = folder.stage("evaluation").path
    summary = read_summary(evaluation)
    console.print()
    console.print(summary_table(summary))
    console.print(verdict(summary, []), style="bold", highlight=False, markup=False, soft_wrap=True)
    for words in warnings(summary):
        console.print(words, style="red", highlight=False, markup=False, soft_wrap=True)
    _sample_pairs(read_samples(evaluation), names_in(summary), console)
    console.print(f"\nreport  {folder.given}/{folder.report.name}", highlight=False, soft_wrap=True)
    console.print(f"serve   rlhf-ray serve {folder.given}", highlight=False, soft_wrap=True)


def _sample_pairs(samples: list[dict], names: RunNames, console: Console) -> None:
    """The first three prompts with the models' answers, PPO's last, and the traits in which that differs from SFT's."""
    yes_no = yes_no_traits(samples)
    for sample in samples[:3]:
        console.print(f"\n[dim]prompt[/]     {escape(one_line(asked(sample), 200))}")
        for model in sorted(models_of_sample(sample), key="ppo".__eq__):
            style, answer, judge = "bold" if model == "ppo" else "dim", sample[model], sample[model].get("judge")
            score = "" if judge is None else f"{judge:.1f}"
            console.print(
                f"[{style}]{names.told(model.upper())}[/]{score:>8}  {escape(one_line(answer['response'], 240))}"
            )
        why = what_differs(sample["sft"], sample["ppo"], yes_no)
        if why:
            console.print(f"[dim]why[/]        {escape(why)}", highlight=False)
