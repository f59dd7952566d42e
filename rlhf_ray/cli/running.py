"""`rlhf-ray run` and the single stages: folder, Ray, stages, closing words."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from rlhf_ray.adopt import adopt_stages
from rlhf_ray.cli.display import Display, one_line, summary_table
from rlhf_ray.cli.interrupt import polite_interrupts
from rlhf_ray.config import Recipe
from rlhf_ray.errors import RunFailed, StageStopped, UserError, machine_failed
from rlhf_ray.events import EventLog
from rlhf_ray.pipeline import prepare_folder, run_stages, stages_of
from rlhf_ray.recipe_file import check_resume, recorded_recipe
from rlhf_ray.run_folder import RunFolder
from rlhf_ray.threads import SUPERVISED, settle_threads

WORKERS = {"supervised": set(SUPERVISED), "ppo": {"ppo", "evaluation"}}  # kind of worker -> the stages that have some


def run_folder_of(recipe: Recipe, run_dir: str | None) -> RunFolder:
    """RUN_DIR, absolute before any process starts: a worker's working directory is not ours."""
    if run_dir is not None and "://" in run_dir:
        raise UserError(
            f"--run-dir {run_dir!r} is a URI; give a folder that every node sees (a local disk on one machine, NFS on several)"
        )
    return RunFolder(Path(run_dir or f"runs/{recipe.name}").absolute())


def absolute_paths(recipe: Recipe) -> Recipe:
    """Data paths and model folders made absolute: a worker's or a job's working directory is another."""
    from rlhf_ray.data.paths import resolve_paths

    root = recipe.data.root
    if root is not None and "://" not in root and not Path(root).expanduser().exists():
        raise UserError(f"data.root = '{root}' is not there; give the folder that holds the data")
    changes = {"data": resolve_paths(recipe.data)}
    if not recipe.model.is_from_scratch:
        changes["model"] = recipe.model.model_copy(update={"name_or_path": _absolute(recipe.model.name_or_path)})
    for name in ("reward", "judge"):
        section = getattr(recipe, name)
        if section is not None and not section.starts_within_run:
            changes[name] = section.model_copy(update={"base": _absolute(section.base)})
    rewards = {
        name: term if term.model in (None, "reward") else term.model_copy(update={"model": _absolute(term.model)})
        for name, term in recipe.ppo.rewards.items()
    }
    if rewards != recipe.ppo.rewards:
        changes["ppo"] = recipe.ppo.model_copy(update={"rewards": rewards})
    return recipe.model_copy(update=changes)


def _absolute(model: str) -> str:
    """A model's folder here as an absolute path; a hub name stays."""
    folder = Path(model).expanduser()
    return str(folder.absolute()) if folder.exists() else model


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
    import ray

    from rlhf_ray.actors.session import ray_session
    from rlhf_ray.actors.stages import check_cluster, ray_stages

    recipe = absolute_paths(recipe)
    folder = run_folder_of(recipe, None if run_dir is None else str(run_dir))
    check_resume(recipe, folder)
    refuse_problems(recipe, folder, address)
    running: list[str | None] = [None]
    with held(folder), Display(console) as display:
        if start_from is not None:
            adopt_stages(recipe, folder, RunFolder(Path(start_from).absolute()))

        def progress(event: dict) -> None:
            if event.get("started") or event.get("done"):
                running[0] = event["stage"] if event.get("started") else None
            display(event)

        left = [name for name in (stages or stages_of(recipe)) if not folder.stage(name).done]
        with ExitStack() as stack:
            connected = bool(left) and left != ["data"]
            if connected:
                kinds = [kind for kind, of in WORKERS.items() if of.intersection(left)]
                stack.enter_context(
                    ray_session(
                        address,
                        object_store_bytes=object_store_bytes(recipe),
                        stages=kinds,
                        spins=recipe.ppo.steps_ahead == 0,
                    )
                )
                check_cluster(recipe, left)
            recipe = settle_threads(recipe, recorded_recipe(folder), **cores_to_share(address if connected else None))
            prepare_folder(recipe, folder)

            def at_once() -> None:
                display.close()
                ray.shutdown()

            # After Ray, which puts a handler of its own on SIGTERM.
            stopping = stack.enter_context(polite_interrupts(folder, lambda: running[0], display.log, at_once))
            with failures_recorded(folder, lambda: running[0]):
                run_stages(recipe, folder, ray_stages(), progress, stages, stopping)
    return folder


def cores_to_share(address: str | None) -> dict[str, int]:
    """What `settle_threads` wants to know of this machine, or of the cluster that this process is connected to."""
    if address is None:
        return {"cores": len(os.sched_getaffinity(0))}
    from rlhf_ray.actors.placement import nodes_alive

    cpus = [int(node["CPU"]) for node in nodes_alive() if node.get("CPU", 0.0) >= 1.0]
    return {"cores": min(cpus, default=1), "nodes": max(1, len(cpus))}


@contextmanager
def failures_recorded(folder: RunFolder, current_stage: Callable[[], str | None]) -> Iterator[None]:
    """What ends the run is written to events.jsonl; a failure of this machine (a full disk) comes out in words."""
    try:
        yield
    except StageStopped:
        raise
    except Exception as error:
        failure = machine_failed(current_stage() or "the run", error) if isinstance(error, OSError) else error
        if isinstance(failure, (RunFailed, UserError)):
            what = str(failure)
        else:  # a bug: its text may be a whole traceback, which goes to the terminal
            what = "".join(traceback.format_exception_only(failure)).strip().splitlines()[-1][:300]
        done = "the run stopped; the same command goes on from the last checkpoint"
        with suppress(OSError):  # a full disk has no room for the event either
            EventLog(folder.events).add(what, done, stage=current_stage())
        if failure is error:
            raise
        raise failure from error


def object_store_bytes(recipe: Recipe) -> int:
    """Room for the policy's weights in float32 three times over, and for rollouts."""
    from rlhf_ray.models.size import parameters

    return 512 * 1024**2 + 3 * 4 * parameters(recipe)


def refuse_problems(recipe: Recipe, folder: RunFolder, address: str | None) -> None:
    """What `doctor` would find in the recipe, told before anything starts."""
    from rlhf_ray.cli.doctor import recipe_problems

    problems = recipe_problems(recipe, data=not folder.stage("data").done, hardware=address is None)
    if problems:
        raise UserError("\n".join(problems))


@contextmanager
def held(folder: RunFolder) -> Iterator[None]:
    """This process alone works in the run folder; the lock goes with the process, however it ends."""
    folder.path.mkdir(parents=True, exist_ok=True)
    with open(folder.path / ".lock", "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise UserError(
                f"{folder.path} is in use by {lock.read().strip() or 'another run'}; wait for it, or choose another --run-dir"
            ) from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
        yield


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
