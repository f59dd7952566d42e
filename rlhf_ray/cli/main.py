"""The command line. Each command is a few lines here; what it does is a plain function elsewhere."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

# Read by libraries at import; a user's own setting wins.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # we report a hub out of reach in one sentence, without its eight retries
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray's own ports answer to the token's holders only
if not any(Path("/dev").glob("nvidia[0-9]*")):
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed looks for a GPU and warns

import typer

from rlhf_ray.cli.bench import bench_app
from rlhf_ray.cli.command_errors import Commands, console, in_words
from rlhf_ray.cli.publish import publish
from rlhf_ray.cli.rounds import round_
from rlhf_ray.cli.serve_command import serve
from rlhf_ray.cli.status_command import status
from rlhf_ray.cli.votes import votes_app
from rlhf_ray.config.stage_table import STAGES, model_names, stages_of_command
from rlhf_ray.errors import UserError

app = typer.Typer(
    name="rlhf-ray", cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="From human preferences to a served, aligned language model: SFT, reward model, PPO, evaluation, on Ray.",
)  # fmt: skip

RecipeArgument = Annotated[
    str, typer.Argument(help="a recipe YAML, or the name of a packaged one (demo, smollm2-sentiment, imdb, ...)")
]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="override a key: --set ppo.steps=50 (repeatable)")]
RunDir = Annotated[
    str | None, typer.Option("--run-dir", help="the run folder, or a URL such as s3://bucket/run; default runs/<recipe name>")
]
StartFrom = Annotated[
    str | None,
    typer.Option(
        "--start-from", help="a run folder whose finished stages before PPO (same recipe there) are taken over"
    ),
]
Address = Annotated[str | None, typer.Option(help="a running Ray cluster ('auto' or HOST:PORT); default: a local one of its own")]
Nodes = Annotated[str | None, typer.Option(help="plan for nodes that are not there: NODESxGPUSxKIND, as 2x8xH100")]


@app.command()
@in_words
def run(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    run_dir: RunDir = None,
    address: Address = None,
    start_from: StartFrom = None,
):
    """Run all stages; a run folder that stopped goes on where it was."""
    from rlhf_ray.cli.running import closing_words
    from rlhf_ray.cli.running import run as run_recipe
    from rlhf_ray.config.recipe_file import load_recipe

    folder = run_recipe(
        load_recipe(recipe, overrides), run_dir, address=address, start_from=start_from, console=console
    )
    closing_words(folder, console)


def _stage_command(name: str, text: str) -> None:
    """A command that runs those of its stages that the recipe has, and first what they need."""

    @app.command(name=name, help=text)
    @in_words
    def command(
        recipe: RecipeArgument,
        overrides: Overrides = None,
        run_dir: RunDir = None,
        address: Address = None,
        start_from: StartFrom = None,
    ):
        from rlhf_ray.cli.running import run_some

        run_some(
            stages_of_command(name), recipe, overrides, run_dir,
            address=address, start_from=start_from, console=console, called=name,
        )  # fmt: skip


for each in STAGES.values():
    if each.command is not None and each.help is not None:
        _stage_command(each.command, each.help)


@app.command()
@in_words
def stage(
    name: Annotated[str, typer.Argument(help="a stage of the recipe, e.g. one of a plugin, which has no command of its own")],
    recipe: RecipeArgument,
    overrides: Overrides = None,
    run_dir: RunDir = None,
    address: Address = None,
    start_from: StartFrom = None,
):
    """One stage (and what it needs), by its name."""
    from rlhf_ray.cli.running import run_some

    run_some([name], recipe, overrides, run_dir, address=address, start_from=start_from, console=console, called=name)


@app.command()
@in_words
def doctor(
    recipe: RecipeArgument, overrides: Overrides = None, run_dir: RunDir = None, address: Address = None, nodes: Nodes = None
):
    """Everything that would stop this run, before it starts, and what it will use."""
    from rlhf_ray.cli.doctor import examine

    problems = examine(recipe, overrides or [], run_dir, address, nodes, console)
    if problems:
        raise UserError("\n".join(problems))


@app.command()
@in_words
def report(run_dir: Annotated[str, typer.Argument(help="a run folder, or its URL")]):
    """Write RUN_DIR/report.html from what the run folder holds."""
    from rlhf_ray.report.page import write_report
    from rlhf_ray.runs.contents import to_tell
    from rlhf_ray.runs.remote import local_copy, put_back
    from rlhf_ray.runs.remote_store import is_url
    from rlhf_ray.runs.run_folder import RunFolder

    if not is_url(run_dir) and not Path(run_dir).is_dir():
        raise UserError(f"'{run_dir}' is not a folder; name a run folder, for example runs/demo")
    page = write_report(RunFolder(local_copy(run_dir, to_tell).absolute()))
    console.print(put_back(run_dir, page, "report.html"), highlight=False, soft_wrap=True)


app.command()(serve)
app.command()(publish)
app.command(name="round")(round_)


ClusterAddress = Annotated[str | None, typer.Option(help="the cluster's dashboard, http://HEAD:8265")]
JobId = Annotated[str, typer.Argument(help="as `submit` printed it, e.g. demo-1")]


@app.command()
@in_words
def submit(
    recipe: RecipeArgument,
    run_dir: Annotated[
        str, typer.Option("--run-dir", help="absolute path that every node of the cluster sees, or a URL such as s3://...")
    ],
    overrides: Overrides = None,
    address: ClusterAddress = None,
    data: Annotated[list[str] | None, typer.Option(help="small files or folders to upload with the job")] = None,
    env: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE in the job's environment; NAME alone: its value here (repeatable)")
    ] = None,
    stop_wait_s: Annotated[int, typer.Option(help="how long a stopped run may take to write its checkpoint")] = 600,
    follow: Annotated[bool, typer.Option(help="follow the log and return the run's exit status")] = True,
    retries: Annotated[int, typer.Option(min=0, help="submit a run whose driver or head dies again, so often at most")] = 0,
):
    """Run a recipe as a Ray job on a running cluster; the same run folder again resumes it."""
    from rlhf_ray.actors import jobs
    from rlhf_ray.actors.resubmit import submit_until_done
    from rlhf_ray.config.recipe_file import load_recipe

    if retries > 0 and not follow:
        raise UserError(f"--retries {retries} needs a terminal that follows the run; leave out --no-follow")
    if retries > 0:
        status = submit_until_done(
            load_recipe(recipe, overrides), run_dir, retries=retries, address=address, data=data or (),
            env=jobs.environment_of(env or []), stop_wait_s=stop_wait_s, echo=_echo,
        )  # fmt: skip
        raise typer.Exit(status)
    job_id = jobs.submit(
        load_recipe(recipe, overrides),
        run_dir,
        address=address,
        data=data or (),
        env=jobs.environment_of(env or []),
        stop_wait_s=stop_wait_s,
        echo=_echo,
    )
    if follow:
        raise typer.Exit(jobs.logs(job_id, address=address, echo=_echo))


@app.command()
@in_words
def logs(
    job_id: JobId,
    address: ClusterAddress = None,
    follow: Annotated[bool, typer.Option(help="until the job ends")] = True,
):
    """Print a job's log and return its exit status."""
    from rlhf_ray.actors import jobs

    raise typer.Exit(jobs.logs(job_id, address=address, follow=follow, echo=_echo))


@app.command()
@in_words
def stop(job_id: JobId, address: ClusterAddress = None):
    """Ask a job to finish its step, write a checkpoint and end."""
    from rlhf_ray.actors import jobs

    raise typer.Exit(jobs.stop(job_id, address=address, echo=_echo))


def _echo(line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)


@app.command()
@in_words
def export(
    source: Annotated[
        str, typer.Argument(help="a run folder, a PPO checkpoint (ppo/checkpoints/step_...) or a model folder; or a URL of one")
    ],
    target: Annotated[str, typer.Argument(help="the Hugging Face folder to write")],
    stage: Annotated[str, typer.Option(help=f"of a run folder: {', '.join(model_names())}")] = "ppo",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    push_to_hub: Annotated[str | None, typer.Option(help="also upload to this hub repository")] = None,
):
    """Write a Hugging Face folder from any checkpoint."""
    from rlhf_ray.config.user_paths import on_this_machine
    from rlhf_ray.ppo.export_model import export_model
    from rlhf_ray.runs.contents import to_export
    from rlhf_ray.runs.remote import local_copy

    written = on_this_machine(target, "the folder to write")
    folder = export_model(local_copy(source, to_export(stage)), written, stage, dtype, push_to_hub)
    console.print(str(folder), highlight=False, soft_wrap=True)


@app.command(name="import")
@in_words
def import_(
    file: Annotated[str, typer.Argument(help="a GGUF file of a causal language model")],
    target: Annotated[str, typer.Argument(help="the Hugging Face folder to write")],
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32")] = "bfloat16",
):
    """Write a Hugging Face folder from a GGUF file: config, dequantised weights, tokenizer, chat template."""
    from rlhf_ray.config.user_paths import on_this_machine
    from rlhf_ray.models.import_gguf import import_gguf

    paths = on_this_machine(file, "the GGUF file"), on_this_machine(target, "the folder to write")
    console.print(str(import_gguf(*paths, dtype)), highlight=False, soft_wrap=True)


app.command()(in_words(status))
app.add_typer(votes_app, name="votes")
app.add_typer(bench_app, name="bench")


def main() -> None:
    app()


if __name__ == "__main__":
    sys.exit(main())
