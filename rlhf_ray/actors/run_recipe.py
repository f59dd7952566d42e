"""A run from its recipe to its last stage: the folder, Ray, the stages in order."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Protocol

import ray

from rlhf_ray.actors.checks import recipe_problems
from rlhf_ray.actors.placement import nodes_alive
from rlhf_ray.actors.ray_stages import check_cluster, ray_stages
from rlhf_ray.actors.ray_start import refuse_second_ray
from rlhf_ray.actors.session import OBJECT_STORE_BYTES, ray_session
from rlhf_ray.actors.snapshots import BYTES_PER_WEIGHT_BYTE, KEPT
from rlhf_ray.config import Recipe
from rlhf_ray.config.stage_table import STAGES
from rlhf_ray.config.threads import settle_threads
from rlhf_ray.data.paths import absolute_paths
from rlhf_ray.errors import RunFailed, StageStopped, UserError, machine_failed, whole_message
from rlhf_ray.models.memory import support_store_bytes, support_tokens, trained_by_role
from rlhf_ray.models.size import parameters
from rlhf_ray.runs.events import EventLog
from rlhf_ray.runs.interrupt import polite_interrupts
from rlhf_ray.runs.pipeline import check_stage, prepare_folder, run_stages, to_reopen
from rlhf_ray.runs.resume import check_resume, recorded_recipe
from rlhf_ray.runs.run_folder import RunFolder, held, run_folder_of
from rlhf_ray.runs.start_from import adopt_stages


class RunDisplay(Protocol):
    """What a run tells of its progress."""

    def __call__(self, event: dict) -> None: ...
    def log(self, line: str) -> None: ...
    def close(self) -> None: ...


def run(
    recipe: Recipe,
    run_dir: str | Path | None = None,
    *,
    address: str | None = None,
    stages: list[str] | None = None,
    start_from: str | Path | None = None,
    display: Callable[[], AbstractContextManager[RunDisplay]],
) -> RunFolder:
    """Run the recipe's stages (default: all) in its run folder, from where that stands.

    start_from: another run folder, whose finished stages before PPO are taken over where this one has none yet.
    display: opened once the run folder is held and nothing stands in the way; it is told the progress.
    Raises UserError for a mistake in recipe, data or resources, StageStopped after Ctrl-C.
    """
    recipe = absolute_paths(recipe)
    folder = run_folder_of(recipe, None if run_dir is None else str(run_dir))
    check_resume(recipe, folder)
    refuse_second_ray()
    folders = [folder] if start_from is None else [folder, RunFolder(Path(start_from).absolute())]
    to_run = [name for name in stages or recipe.stages if not any(each.stage(name).done for each in folders)]
    refuse_problems(recipe, folder, address, to_run)
    running: list[str | None] = [None]
    with held(folder), display() as shown:
        if start_from is not None:
            adopt_stages(recipe, folder, RunFolder(Path(start_from).absolute()))

        def progress(event: dict) -> None:
            if event.get("started") or event.get("done"):
                running[0] = event["stage"] if event.get("started") else None
            shown(event)

        again = to_reopen(recipe, folder, check_resume(recipe, folder))
        left = [name for name in (stages or recipe.stages) if not folder.stage(name).done or name in again]
        for name in left:
            check_stage(recipe, folder, name)  # by what is there already; once more when its turn comes
        with ExitStack() as stack:
            kinds = list(dict.fromkeys(STAGES[name].workers for name in left if STAGES[name].workers != "none"))
            connected = bool(kinds)
            if connected:
                stack.enter_context(
                    ray_session(
                        address,
                        object_store_bytes=object_store_bytes(recipe),
                        stages=kinds,
                        spins=recipe.ppo.steps_ahead == 0,
                        start_timeout_s=recipe.resources.start_timeout_s,
                        log=folder.ray_log,
                    )
                )
                check_cluster(recipe, left)
            recipe = settle_threads(recipe, recorded_recipe(folder), **cores_to_share(address if connected else None))
            prepare_folder(recipe, folder)

            def at_once() -> None:
                shown.close()
                ray.shutdown()

            # After Ray's start, which Ctrl-C ends at once.
            stopping = stack.enter_context(polite_interrupts(folder, lambda: running[0], shown.log, at_once))
            with failures_recorded(folder, lambda: running[0]):
                run_stages(recipe, folder, ray_stages(), progress, stages, stopping)
    return folder


def cores_to_share(address: str | None) -> dict[str, int]:
    """What `settle_threads` wants to know of this machine, or of the cluster that this process is connected to."""
    if address is None:
        return {"cores": len(os.sched_getaffinity(0))}
    cpus = [int(node["CPU"]) for node in nodes_alive() if node.get("CPU", 0.0) >= 1.0]
    return {"cores": min(cpus, default=1), "nodes": max(1, len(cpus))}


@contextmanager
def failures_recorded(folder: RunFolder, current_stage: Callable[[], str | None]) -> Iterator[None]:
    """What ends the run is written to events.jsonl; a failure of this machine (a full disk) becomes one sentence."""
    try:
        yield
    except StageStopped:
        raise
    except Exception as error:  # fault boundary: the run; what ends it is recorded, and raised
        failure = machine_failed(current_stage() or "the run", error) if isinstance(error, OSError) else error
        if isinstance(failure, (RunFailed, UserError)):
            what = str(failure)
        else:  # a bug: its text may be a whole traceback, which goes to the terminal
            what = whole_message("".join(traceback.format_exception_only(failure)))
        done = "the run stopped; the same command goes on from the last checkpoint"
        with suppress(OSError):  # a full disk has no room for the event either
            EventLog(folder.events).add(what, done, stage=current_stage())
        if failure is error:
            raise
        raise failure from error


def object_store_bytes(recipe: Recipe) -> int:
    """Bytes for three copies of the policy's weights in float32, for snapshots, for rollouts, and for the tokens that truncated
    sampling keeps.

    The last are as many as there can be (`models.memory.support_tokens`), as far as half of what shared memory has left holds
    them beside the rest: Ray would put a larger store on a disk. Of this one only what overflows goes there.
    """
    states = KEPT * BYTES_PER_WEIGHT_BYTE * 4 * sum(trained_by_role(recipe).values())
    snapshots = states if states <= recipe.resources.snapshot_gb * 1e9 else 0
    base = OBJECT_STORE_BYTES + 3 * 4 * parameters(recipe) + snapshots
    kept = support_store_bytes(recipe, support_tokens(recipe))
    return base + int(min(kept, max(0, shared_memory_bytes() // 2 - base)))


def shared_memory_bytes() -> int:
    """Free bytes of the file system that Ray's object store is in; 0 where there is none (not Linux)."""
    try:
        found = os.statvfs("/dev/shm")
    except OSError:
        return 0
    return found.f_bsize * found.f_bavail


def refuse_problems(recipe: Recipe, folder: RunFolder, address: str | None, stages: Sequence[str]) -> None:
    """UserError for what `doctor` would find in the recipe, before anything starts. stages: those that are to run."""
    problems = recipe_problems(recipe, data=not folder.stage("data").done, hardware=address is None, stages=stages)
    if problems:
        raise UserError("\n".join(problems))
