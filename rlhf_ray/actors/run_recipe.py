"""A run from its recipe to its last stage: the folder, Ray, the stages in order."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Protocol

import ray

from rlhf_ray.actors.checks import check_memory, left_on_cpus, recipe_problems
from rlhf_ray.actors.nodes import cluster_nodes, this_machine
from rlhf_ray.actors.placement import nodes_alive
from rlhf_ray.actors.ray_stages import check_cluster, ray_stages
from rlhf_ray.actors.ray_start import refuse_second_ray
from rlhf_ray.actors.run_metrics import RunMetrics
from rlhf_ray.actors.session import OBJECT_STORE_BYTES, ray_session
from rlhf_ray.config import Recipe
from rlhf_ray.config.stage_table import STAGES
from rlhf_ray.config.threads import settle_threads
from rlhf_ray.data.paths import absolute_paths
from rlhf_ray.errors import RunFailed, StageStopped, UserError, machine_failed, whole_message
from rlhf_ray.models.memory import snapshot_bytes
from rlhf_ray.models.sent_weights import versions_in_store
from rlhf_ray.models.size import parameters
from rlhf_ray.models.support_memory import support_store_bytes, support_tokens
from rlhf_ray.runs.contents import before_ppo
from rlhf_ray.runs.events import EventLog
from rlhf_ray.runs.interrupt import polite_interrupts
from rlhf_ray.runs.pipeline import StageFunction, check_stage, known_stages, prepare_folder, run_stages, to_reopen
from rlhf_ray.runs.remote import Stored, in_store, local_copy
from rlhf_ray.runs.remote_store import is_url
from rlhf_ray.runs.resume import check_resume, recorded_recipe
from rlhf_ray.runs.run_folder import RunFolder, folder_path, held, run_folder_of
from rlhf_ray.runs.start_from import adopt_stages
from rlhf_ray.runs.status import newest_checkpoint
from rlhf_ray.runs.status_file import StatusFile


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
    known_stages(recipe, stages)
    recipe = absolute_paths(recipe)
    folder = run_folder_of(recipe, None if run_dir is None else str(run_dir))
    refuse_second_ray()
    source = None if start_from is None else _other_run(start_from)
    with in_store(folder, recipe.resources.upload_timeout_s) as stored:
        _run(recipe, folder if stored is None else stored.folder, address, stages, source, display, stored)
    return folder


def _other_run(start_from: str | Path) -> RunFolder:
    if is_url(start_from):
        return RunFolder(local_copy(start_from, before_ppo), str(start_from))
    return RunFolder(folder_path(start_from, "--start-from"))


def _run(
    recipe: Recipe,
    folder: RunFolder,
    address: str | None,
    stages: list[str] | None,
    source: RunFolder | None,
    display: Callable[[], AbstractContextManager[RunDisplay]],
    stored: Stored | None,
) -> None:
    """`run` in a folder that is this process's: as a path it is not yet. stored: its hold on the folder in a store."""
    check_resume(recipe, folder)
    there = [each for each in (folder, source) if each is not None]
    to_run = [name for name in stages or recipe.stages if not any(each.stage(name).done for each in there)]
    refuse_problems(recipe, folder, address, to_run)
    running: list[str | None] = [None]
    exported = RunMetrics(recipe.name)
    status = StatusFile(folder.status, lambda now: exported.tell(now, newest_checkpoint(folder, now.stage)[1]))
    with held(folder) if stored is None else nullcontext(), status.told(), display() as shown:
        if stored is not None:
            stored.tells(shown.log)
        if source is not None:
            adopt_stages(recipe, folder, source)

        def progress(event: dict) -> None:
            if stored is not None:
                stored.check()
            if event.get("started") or event.get("done"):
                running[0] = event["stage"] if event.get("started") else None
            for hears in (status.hear, exported.hear, shown):
                hears(event)

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
                status.exports(stack.enter_context(exported.exported()))
                check_cluster(recipe, left)
                nodes = [this_machine()] if address is None else cluster_nodes()
                if address is not None:
                    check_memory(recipe, nodes, here=False, stages=left)
                for warning in left_on_cpus(recipe, nodes):
                    shown.log(f"warning: {warning}")
            recipe = settle_threads(recipe, recorded_recipe(folder), **cores_to_share(address if connected else None))
            prepare_folder(recipe, folder)

            def at_once() -> None:
                status.end("stopped", "stopped at once; the same command goes on from the last checkpoint")
                shown.close()
                ray.shutdown()

            # After Ray's start, which Ctrl-C ends at once.
            stopping = stack.enter_context(polite_interrupts(folder, lambda: running[0], shown.log, at_once))
            with failures_recorded(folder, lambda: running[0]):
                of_stages = ray_stages()
                if stored is not None:
                    of_stages = {name: partial(_stage_in_store, stored, each) for name, each in of_stages.items()}
                run_stages(recipe, folder, of_stages, progress, stages, stopping)
        if stored is not None:
            stored.finish(recipe.resources.upload_timeout_s, _says_now_and_then(shown.log))


def _stage_in_store(
    stored: Stored, function: StageFunction, recipe: Recipe, folder: RunFolder, progress: Callable[[dict], None]
) -> dict | None:
    """Processes on other hosts fetch what the stage needs from the store, so it has to be there."""
    if ray.is_initialized() and len(nodes_alive()) > 1:
        stored.finish(recipe.resources.upload_timeout_s)
    return function(recipe, folder, progress)


def _says_now_and_then(say: Callable[[str], None], every_s: float = 30.0) -> Callable[[str, float], None]:
    """A wait in words: after five seconds, then every half minute."""
    due = 5.0

    def waiting(what: str, seconds: float) -> None:
        nonlocal due
        if seconds >= due:
            say(f"waiting {seconds:.0f} s for {what}")
            due = seconds + every_s

    return waiting


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
    """Bytes for versions of the policy's weights in float32, for snapshots, for rollouts, and for the tokens that truncated
    sampling keeps.

    The last are as many as there can be (`models.memory.support_tokens`), as far as half of what shared memory has left holds
    them beside the rest: Ray would put a larger store on a disk. Of this one only what overflows goes there.
    """
    base = OBJECT_STORE_BYTES + versions_in_store(recipe) * 4 * parameters(recipe) + int(snapshot_bytes(recipe))
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
    problems = recipe_problems(recipe, data=not folder.stage("data").done, hardware=address is None)
    if problems:
        raise UserError("\n".join(problems))
    if address is None:
        check_memory(recipe, [this_machine()], here=True, stages=stages)
