"""Runs a supervised stage under Ray Train's TorchTrainer.

Ray must be initialised. Library noise goes to RUN/logs/<stage>.log; the terminal stays the caller's.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import ray
from ray.exceptions import RayError, RayTaskError
from ray.train import ControllerError, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.v2.api.config import LoggingConfig

from rlhf_ray.actors.low_memory import REMEDY, ended_by_guard
from rlhf_ray.actors.placement import nodes_alive
from rlhf_ray.actors.ray_private import NO_ROOM
from rlhf_ray.actors.ray_trainer import MeetingConfig, RecordFailures, StageTorchTrainer
from rlhf_ray.actors.supervised_worker import processes_of, train_in_worker
from rlhf_ray.actors.worker_watch import WorkerWatch
from rlhf_ray.config import Recipe, RewardConfig, TrainConfig
from rlhf_ray.errors import NotFinite, RunFailed, StageStopped, UserError, whole_message
from rlhf_ray.runs.elsewhere import handed_over, take_up
from rlhf_ray.runs.events import EventLog
from rlhf_ray.runs.run_folder import RunFolder, read_figures, write_figures
from rlhf_ray.supervised.checkpoints import newest_complete
from rlhf_ray.supervised.ensemble import ensemble_summary
from rlhf_ray.supervised.learning_rate import outlook

Progress = Callable[[dict], None]
RESTARTS = 3  # of a worker group that died; each goes on from the newest checkpoint
POLL_S = 0.5
REPORT_S = 1.0
TAKE_UP_S = 10.0  # between two looks at what a worker on another host has written


def run_supervised(recipe: Recipe, folder: RunFolder, stage: str, on_progress: Progress | None = None) -> dict:
    """Train the stage to its end, all members of an ensemble -> its summary, which DONE holds too.

    Raises UserError for a user's mistake, StageStopped once asked to stop (the STOP file) and checkpointed, RunFailed
    when the workers failed too often or stand still.
    """
    target, config = folder.stage(stage), recipe.trained[stage]
    if target.done:
        return target.summary()
    _check_capacity(stage, config)
    members = config.members if isinstance(config, RewardConfig) else 1
    each = []
    for member in range(members):
        done = target.member_done(member)
        if not done.exists():
            summary = _train(recipe, folder, stage, config, member, on_progress)
            if members == 1:
                each.append(summary)
                break
            write_figures(done, summary)
        each.append(read_figures(done, ("seconds",)))
        shutil.rmtree(target.member(member).checkpoints, ignore_errors=True)
    summary = ensemble_summary(each, target, config) if isinstance(config, RewardConfig) and members > 1 else each[0]
    target.finish(summary)
    shutil.rmtree(target.checkpoints, ignore_errors=True)
    handed_over(folder, stage)
    return summary


def _train(
    recipe: Recipe, folder: RunFolder, stage: str, config: TrainConfig, member: int, on_progress: Progress | None
) -> dict:
    """Train one model -> its summary."""
    target = folder.stage(stage).member(member)
    target.path.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()

    def report(words: str) -> None:
        EventLog(folder.events).add(words, "read the one before it", stage=stage)

    take_up(folder, stage)  # what another host had done when the run died
    found = newest_complete(target.checkpoints, report)
    if found is not None:
        # Its training time stands for what earlier runs took.
        started -= found[1].elapsed_s
        if on_progress is not None:
            of = f" (model {member + 1} of {config.members})" if isinstance(config, RewardConfig) and config.members > 1 else ""
            on_progress({"stage": stage, "goes_on_from": found[1].step, "of": of})
    answer = _fit_again(recipe, folder, stage, config, member, on_progress)
    take_up(folder, stage)
    if "refused" in answer:
        raise UserError(answer["refused"])
    if "not_finite" in answer:
        raise NotFinite(answer["not_finite"])
    if answer["ended_by"] == "stop":
        target.stop_file.unlink(missing_ok=True)
        kept = newest_complete(target.checkpoints)
        if kept is None or kept[1].step != answer["steps"]:  # events.jsonl says why
            since = "its start" if kept is None else f"step {kept[1].step}"
            raise StageStopped(f"{stage} stopped at step {answer['steps']}; no checkpoint could be written since {since}")
        raise StageStopped(f"{stage} stopped; its checkpoint is written")
    return answer | {"seconds": round(time.monotonic() - started, 2)}


def _check_capacity(stage: str, config: TrainConfig) -> None:
    """Refuse at once what the whole cluster could not hold; what is merely in use is waited for, with a deadline."""
    there = ray.cluster_resources()
    for name, each in (("CPU", config.cpus_per_worker), ("GPU", config.gpus_per_worker)):
        wanted = each * config.workers
        if wanted > there.get(name, 0):
            key = f"{stage}.{name.lower()}s_per_worker"
            raise UserError(
                f"{stage}.workers = {config.workers} with {key} = {each:g} need {wanted:g} {name}s, the cluster has "
                f"{there.get(name, 0):g}; lower one of them or add nodes"
            )


def _fit_again(
    recipe: Recipe, folder: RunFolder, stage: str, config: TrainConfig, member: int, on_progress: Progress | None
) -> dict:
    """`_fit`, and once more where Ray Train's controller died: the workers end with it, and new ones go on from the newest
    checkpoint."""
    for number in range(1, RESTARTS + 2):
        began = time.monotonic()
        try:
            return _fit(recipe, folder, stage, config, member, on_progress)
        except ControllerLost as lost:
            done = "started again from the newest checkpoint"
            if number > RESTARTS:
                done = f"the stage failed: that was failure {number}, and {RESTARTS} restarts are allowed"
            row = _last_row(folder.stage(stage).member(member).metrics)
            EventLog(folder.events).add(
                f"the controller of {stage} was lost", done, time.monotonic() - began, stage=stage, role="controller",
                step=None if row is None else row["step"], phase="training", seen=whole_message(lost.__cause__ or lost),
            )  # fmt: skip
            if number > RESTARTS:
                raise
    raise AssertionError("it returns or raises")


class ControllerLost(RunFailed):
    """The process of Ray Train's controller, or its node, is gone."""


def _fit(
    recipe: Recipe, folder: RunFolder, stage: str, config: TrainConfig, member: int, on_progress: Progress | None
) -> dict:
    """Run the worker group to its end, reporting progress -> what rank 0 returned."""
    timeout_s = recipe.resources.start_timeout_s
    # Ray Train reads these here and hands them on. Without a limit on failed starts it would wait for a full cluster
    # forever (the failure policy below allows none).
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(timeout_s)
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # saves an actor; a preempted node is a dead one
    os.environ["RAY_TRAIN_ENABLE_PRINT_PATCH"] = "0"  # prints of the worker belong in its log file, untagged
    storage, name = folder.logs / "ray_train", f"{stage}_{member}"
    processes = processes_of(folder, stage, member)
    shutil.rmtree(processes, ignore_errors=True)  # of a run that died
    storage.mkdir(parents=True, exist_ok=True)
    trainer = StageTorchTrainer(
        train_in_worker,
        train_loop_config={
            "recipe": recipe.model_dump(mode="json"),
            "folder": str(folder.path),
            "url": folder.url,
            "session": folder.session,
            "stage": stage,
            "member": member,
        },
        torch_config=MeetingConfig(backend="nccl" if config.gpus_per_worker > 0 else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=config.workers,
            use_gpu=config.gpus_per_worker > 0,
            resources_per_worker={"CPU": config.cpus_per_worker}
            | ({"GPU": config.gpus_per_worker} if config.gpus_per_worker > 0 else {}),
        ),
        run_config=RunConfig(
            name=name,
            storage_path=str(storage),
            failure_config=FailureConfig(max_failures=RESTARTS, controller_failure_limit=0),
            callbacks=[RecordFailures(folder, stage, member, RESTARTS)],
            worker_runtime_env={"env_vars": _worker_environment(config)},
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )
    box: dict = {}

    def fit() -> None:
        try:
            box["result"] = trainer.fit()
        except BaseException as error:  # fault boundary: this thread; the caller's raises it
            box["error"] = error

    # In a thread of its own: the caller's thread reports progress, and keeps its own handling of Ctrl-C, which fit()
    # in the main thread would replace by one that aborts without a checkpoint.
    thread = threading.Thread(target=fit, name=f"{stage} fit", daemon=True)
    thread.start()
    watch = WorkerWatch(processes, stage, EventLog(folder.events))
    _report_until_done(thread, recipe, folder, stage, member, on_progress, watch)
    for path in (storage / name, processes):
        shutil.rmtree(path, ignore_errors=True)
    if "error" in box:
        raise _explained(box["error"], folder, stage, config, timeout_s)
    return box["result"].return_value


def _worker_environment(config: TrainConfig) -> dict[str, str]:
    """Set before the worker loads torch: threads that sleep when idle, DeepSpeed's device, no requests to the hub
    for local files."""
    on_gpu = config.gpus_per_worker > 0
    return {
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false" if config.threads == 1 else "true",
        "DS_ACCELERATOR": "cuda" if on_gpu else "cpu",
        "ACCELERATE_USE_DEEPSPEED": "true",
    } | ({} if on_gpu else {"CUDA_VISIBLE_DEVICES": ""}) | (
        {} if config.threads is None else {"OMP_NUM_THREADS": str(config.threads)}
    )  # fmt: skip


def _report_until_done(
    thread: threading.Thread,
    recipe: Recipe,
    folder: RunFolder,
    stage: str,
    member: int,
    on_progress: Progress | None,
    watch: WorkerWatch,
) -> None:
    """Until the worker group has ended; RunFailed when it stands still. It then ends with the session of Ray."""
    metrics, resources = folder.stage(stage).member(member).metrics, recipe.resources
    started = reported = taken_up = time.monotonic()
    others = folder.url is not None and len(nodes_alive()) > 1
    last_step = (_last_row(metrics) or {}).get("step")  # of a run that this one goes on from
    limit_s = resources.start_timeout_s + resources.call_timeout_s  # the workers may have to wait for room first
    while thread.is_alive():
        thread.join(POLL_S)
        if time.monotonic() - reported < REPORT_S:
            continue
        reported = time.monotonic()
        if others and reported - taken_up > TAKE_UP_S:
            with suppress(RunFailed):  # the store is away for a moment
                take_up(folder, stage)
            taken_up = time.monotonic()
        row = _last_row(metrics)
        step = None if row is None else row["step"]
        went_on = step != last_step
        if went_on:
            last_step, limit_s = step, resources.call_timeout_s
        still_s = watch.look(step, went_on, limit_s)
        if still_s > limit_s:
            where = "before its first step" if step is None else f"after step {step}"
            raise RunFailed(
                f"{stage} stood still for {still_s:.0f} s {where}; see {folder.logs / f'{stage}.log'}, and "
                "raise resources.call_timeout_s if it is only slow; the same command goes on from the last checkpoint"
            )
        if on_progress is None:
            continue
        if row is None:
            waiting = "the worker to start and read its data"
            on_progress({"stage": stage, "waiting_for": waiting, "waiting_s": reported - started})
        else:
            on_progress({"stage": stage, **row, **outlook(row, recipe.trained[stage].max_minutes)})


def _last_row(path: Path) -> dict | None:
    """The last whole line of a metrics.jsonl, without reading the others."""
    if not path.exists():
        return None
    with open(path, "rb") as file:
        file.seek(max(path.stat().st_size - 8192, 0))
        lines = file.read().split(b"\n")[:-1]  # what follows the last newline is still being written
    try:
        return json.loads(lines[-1]) if lines else None
    except ValueError:  # somebody edited it; the worker says so when it opens the file
        return None


def _explained(
    error: BaseException, folder: RunFolder, stage: str, config: TrainConfig, timeout_s: float
) -> BaseException:
    """A sentence for a start that timed out, or workers or controller that failed; the original stands as its cause."""
    lost = isinstance(error, RayError) and not isinstance(error, RayTaskError)  # the controller's process or node
    if not (lost or isinstance(error, TrainingFailedError)):
        return error
    log = folder.logs / f"{stage}.log"
    if NO_ROOM in repr(error.__cause__) + repr(error.__dict__) + str(error):
        explained: Exception = UserError(
            f"waited {timeout_s:g} s for {config.workers} {stage} worker(s) with {config.cpus_per_worker:g} CPUs and "
            f"{config.gpus_per_worker:g} GPUs each, the cluster has no room; free some of it, lower {stage}.workers, "
            "or raise resources.start_timeout_s"
        )
    else:
        times = "" if lost or isinstance(error, ControllerError) else f" {RESTARTS + 1} times, the last time"
        guard = ended_by_guard(error)
        what = whole_message(error) if guard is None else f"{guard}; {REMEDY}"
        explained = (ControllerLost if lost else RunFailed)(
            f"{stage} failed{times} with: {what}; its log is {log}; the same command goes on from the last checkpoint"
        )
    explained.__cause__ = error
    return explained
