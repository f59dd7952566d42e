"""The command line. Each command is a few lines here; what it does is a plain function elsewhere."""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path
from typing import Annotated

# Read by libraries at import; a user's own setting wins.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import typer
from rich.console import Console

from rlhf_ray.cli.interrupt import EXIT_CODE
from rlhf_ray.errors import StageStopped, UserError

app = typer.Typer(
    name="rlhf-ray", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="From human preferences to a served, aligned language model: SFT, reward model, PPO, evaluation, on Ray.",
)  # fmt: skip
console, errors = Console(), Console(stderr=True)

RecipeArgument = Annotated[str, typer.Argument(help="a recipe YAML, or the name of a packaged one (demo, imdb, hh)")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="override a key: --set ppo.steps=50 (repeatable)")]
RunDir = Annotated[str | None, typer.Option("--run-dir", help="the run folder; default runs/<recipe name>")]
Address = Annotated[str | None, typer.Option(help="a running Ray cluster ('auto' or HOST:PORT); default: a local one of its own")]


def in_words(command):
    """User's mistakes: one sentence each on stderr, exit code 2. Ctrl-C: 130."""

    @functools.wraps(command)
    def wrapped(*args, **kwargs):
        try:
            return command(*args, **kwargs)
        except UserError as error:
            for line in str(error).splitlines():
                errors.print(f"rlhf-ray: {line}", style="red", highlight=False, markup=False, soft_wrap=True)
            raise typer.Exit(2) from None
        except StageStopped as stopped:
            console.print(f"{stopped}; the same command goes on from there", highlight=False, soft_wrap=True)
            raise typer.Exit(EXIT_CODE) from None
        except KeyboardInterrupt:
            raise typer.Exit(EXIT_CODE) from None

    return wrapped


@app.command()
@in_words
def run(recipe: RecipeArgument, overrides: Overrides = None, run_dir: RunDir = None, address: Address = None):
    """Run all stages; a run folder that stopped goes on where it was."""
    from rlhf_ray.cli.running import closing_words
    from rlhf_ray.cli.running import run as run_recipe
    from rlhf_ray.recipe_file import load_recipe

    folder = run_recipe(load_recipe(recipe, overrides), run_dir, address=address, console=console)
    closing_words(folder, console)


def _stage_command(name: str, stages: list[str], text: str) -> None:
    @app.command(name=name, help=text)
    @in_words
    def command(recipe: RecipeArgument, overrides: Overrides = None, run_dir: RunDir = None, address: Address = None):
        from rlhf_ray.cli.running import closing_words
        from rlhf_ray.cli.running import run as run_recipe
        from rlhf_ray.pipeline import stages_of
        from rlhf_ray.recipe_file import load_recipe

        loaded = load_recipe(recipe, overrides)
        wanted = [stage for stage in stages if stage == name or stage in stages_of(loaded)]
        target = name if name != "evaluate" else "evaluation"
        if target not in stages_of(loaded):
            raise UserError(f"the recipe '{loaded.name}' has no stage '{target}': its section is null")
        folder = run_recipe(loaded, run_dir, address=address, stages=wanted, console=console)
        if name == "evaluate":
            closing_words(folder, console)
        else:
            console.print(f"{folder.stage(target).path}", highlight=False, soft_wrap=True)


_stage_command("sft", ["data", "sft"], "Supervised fine-tuning (and the data it needs).")
_stage_command("reward", ["data", "sft", "fluency", "reward", "judge"], "The reward model (and the judge, if the recipe has one).")
_stage_command("ppo", ["ppo"], "PPO on the run folder's SFT and reward model.")
_stage_command("evaluate", ["evaluation"], "SFT model against PPO model on held-out prompts, and the report.")


@app.command()
@in_words
def doctor(recipe: RecipeArgument, overrides: Overrides = None, run_dir: RunDir = None, address: Address = None):
    """Everything that would stop this run, before it starts, and what it will use."""
    from rlhf_ray.cli.doctor import examine

    problems = examine(recipe, overrides or [], run_dir, address, console)
    if problems:
        raise UserError("\n".join(problems))


@app.command()
@in_words
def report(run_dir: Annotated[Path, typer.Argument(help="a run folder")]):
    """Write RUN_DIR/report.html from what the run folder holds."""
    from rlhf_ray.evaluation.report import write_report
    from rlhf_ray.run_folder import RunFolder

    if not run_dir.is_dir():
        raise UserError(f"'{run_dir}' is no folder; name a run folder, for example runs/demo")
    console.print(str(write_report(RunFolder(run_dir.absolute()))), highlight=False, soft_wrap=True)


def main() -> None:
    app()


if __name__ == "__main__":
    sys.exit(main())
