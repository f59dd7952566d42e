"""A run as a Ray job: submit it, follow its log, stop it.

The job is `rlhf-ray run RECIPE --address auto --run-dir RUN_DIR` on the cluster's head node. It outlives the terminal
that submitted it, and the run folder is its memory: submitting with the same run folder resumes the run.
"""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import aiohttp
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from rlhf_ray.actors import upload
from rlhf_ray.actors.dashboard import connect, within
from rlhf_ray.config import Recipe
from rlhf_ray.errors import UserError
from rlhf_ray.runs.remote_store import check_url, is_url
from rlhf_ray.runs.run_folder import run_folder_of

STOPPED_EXIT_STATUS = 130  # as after Ctrl-C
_RUN_DIR = "rlhf_ray_run_dir"  # keys of the job's metadata
_STOP_WAIT = "rlhf_ray_stop_wait_s"

SECRET = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD|CREDENTIALS?)$", re.IGNORECASE)

Echo = Callable[[str], None]


def environment_of(options: Sequence[str]) -> dict[str, str]:
    """The `--env` options as variables: NAME=VALUE, or NAME alone, whose value is this process's.

    UserError for what looks like a secret on the command line, which everybody on this machine can list.
    """
    found: dict[str, str] = {}
    for option in options:
        name, given, value = option.partition("=")
        if given and SECRET.search(name):
            raise UserError(
                f"--env {name}=... would show its value to everybody who lists this machine's processes; set {name} in your "
                f"environment and write --env {name}"
            )
        if not given and name not in os.environ:
            raise UserError(f"--env {name!r}: write NAME=VALUE, or set {name} in your environment")
        found[name] = value if given else os.environ[name]
    return found


def submit(
    recipe: Recipe,
    run_dir: str,
    *,
    address: str | None = None,
    data: Sequence[str | Path] = (),
    env: Mapping[str, str] | None = None,
    stop_wait_s: int = 600,
    echo: Echo = print,
) -> str:
    """Submit `recipe` to the cluster whose dashboard is at `address`; return the job's id, e.g. 'demo-1'.

    run_dir: absolute path or URI that every node of the cluster sees. data: files or folders (small) to upload.
    env: environment variables of the job and its actors. stop_wait_s: how long a stopped run may take to finish its
    step and write a checkpoint before it is killed. UserError for what can't work, such as a run folder in use.
    """
    for path in data:
        if is_url(path):
            raise UserError(f"--data '{path}' is a URL, and uploads are of this machine; name the URL in the recipe instead")
    run_dir = cluster_path(run_dir)
    run_folder_of(recipe, run_dir)  # what the run itself would refuse
    if is_url(run_dir):
        check_url(run_dir)
    client = connect(address)
    jobs = _jobs(client)
    for job in jobs:
        if job.metadata and job.metadata.get(_RUN_DIR) == run_dir and not job.status.is_terminal():
            raise UserError(
                f"job {job.submission_id} is still running in {run_dir}; "
                f"{_handles(job.submission_id or '', client)}; or choose another run folder"
            )
    job_id = _next_id(recipe.name, jobs)
    with tempfile.TemporaryDirectory(prefix="rlhf_ray_submit_") as folder:
        items = upload.stage(recipe, Path(folder), run_dir=run_dir, data=data)
        echo(f"job {job_id} on {client.get_address()}, run folder {run_dir}")
        for item in items:
            echo(f"  uploaded  {item}")
        has_data = (Path(folder) / upload.DATA_FOLDER).exists()
        runtime_env = {
            "working_dir": folder,
            # SIGINT is what the run answers by finishing its step and writing a checkpoint.
            # The override: without it Ray refuses a variable that the run, too, hands to its actors.
            "env_vars": {
                "RAY_JOB_STOP_SIGNAL": "SIGINT",
                "RAY_JOB_STOP_WAIT_TIME_S": str(stop_wait_s),
                "RAY_OVERRIDE_JOB_RUNTIME_ENV": "1",
                **(env or {}),
            },
        }
        within(
            300,
            f"the upload to {client.get_address()}",
            lambda: client.submit_job(
                entrypoint=entrypoint(run_dir, has_data=has_data),
                submission_id=job_id,
                runtime_env=runtime_env,
                metadata={_RUN_DIR: run_dir, _STOP_WAIT: str(stop_wait_s)},
            ),
        )
    echo(f"  {_handles(job_id, client)}")
    return job_id


def logs(job_id: str, *, address: str | None = None, follow: bool = True, echo: Echo = print) -> int:
    """Print the job's log; with `follow`, until it ends. Returns the run's exit status, 0 for one that still runs.

    Ctrl-C while following leaves the job alone (returns 130) and says how to come back.
    """
    client = connect(address)
    _info(client, job_id)
    if not follow:
        sys.stdout.write(within(120, f"the log of job {job_id}", lambda: client.get_job_logs(job_id)))
        sys.stdout.flush()
        return _exit_status(_info(client, job_id), echo)
    try:
        asyncio.run(_tail(client, job_id, echo))
        return _exit_status(_wait_terminal(client, job_id, 60), echo)
    except KeyboardInterrupt:
        echo(f"\ndetached; job {job_id} goes on; {_handles(job_id, client)}")
        return STOPPED_EXIT_STATUS


def stop(job_id: str, *, address: str | None = None, echo: Echo = print) -> int:
    """Ask the run to finish its step, write a checkpoint and end; wait until it has. Returns 0 when it has ended."""
    client = connect(address)
    job = _info(client, job_id)
    if job.status.is_terminal():
        echo(f"job {job_id} is not running: {job.status.value.lower()}")
        return 0
    wait_s = int((job.metadata or {}).get(_STOP_WAIT, 3))  # Ray's own default for a job that we did not submit
    echo(f"job {job_id} finishes its step and writes a checkpoint; at most {wait_s} s (Ctrl-C leaves it to that)")
    within(60, f"the stop of job {job_id}", lambda: client.stop_job(job_id))
    try:
        job = _wait_terminal(client, job_id, wait_s + 60)
    except KeyboardInterrupt:
        echo(f"\nnot waiting; see {_command('logs', job_id, client)}")
        return STOPPED_EXIT_STATUS
    echo(f"job {job_id}: {job.status.value.lower()}; submit the same run folder to resume")
    return 0


def cluster_path(run_dir: str) -> str:
    """`run_dir` in one spelling; UserError when it means another folder on every machine."""
    if "://" in run_dir:
        return run_dir.rstrip("/")
    if not os.path.isabs(run_dir):
        raise UserError(
            f"run folder '{run_dir}' is relative, which on a cluster is another folder on every machine; "
            "give an absolute path that all nodes see, for example /shared/runs/demo"
        )
    return os.path.normpath(run_dir)


def entrypoint(run_dir: str, *, has_data: bool = False) -> str:
    """The job's shell command. `exec`: the process that gets the stop signal is the run itself."""
    run = ["python", "-m", "rlhf_ray.cli.main", "run", upload.RECIPE_FILE, "--address", "auto", "--run-dir", run_dir]
    command = "exec " + shlex.join(run)
    if has_data:
        target = shlex.quote(f"{run_dir}/{upload.DATA_FOLDER}")
        command = f"mkdir -p {target} && cp -R {upload.DATA_FOLDER}/. {target}/ && {command}"
    return command


def _jobs(client: JobSubmissionClient) -> list[JobDetails]:
    return [job for job in within(60, "the list of jobs", client.list_jobs) if job.submission_id]


def _info(client: JobSubmissionClient, job_id: str) -> JobDetails:
    try:
        return within(60, f"the state of job {job_id}", lambda: client.get_job_info(job_id))
    except RuntimeError as error:
        if "404" not in str(error):
            raise
        known = ", ".join(f"{job.submission_id} ({job.status.value.lower()})" for job in _jobs(client))
        raise UserError(f"there is no job '{job_id}' on {client.get_address()}; there are: {known or 'none'}") from None


def _next_id(name: str, jobs: list[JobDetails]) -> str:
    taken = {job.submission_id for job in jobs}
    count = 1
    while f"{name}-{count}" in taken:
        count += 1
    return f"{name}-{count}"


def _command(verb: str, job_id: str, client: JobSubmissionClient) -> str:
    return f"rlhf-ray {verb} {job_id} --address {client.get_address()}"


def _handles(job_id: str, client: JobSubmissionClient) -> str:
    return f"follow it: {_command('logs', job_id, client)}; stop it: {_command('stop', job_id, client)}"


async def _tail(
    client: JobSubmissionClient, job_id: str, echo: Echo, *, silence_s: float = 30, patience_s: float = 300
) -> None:
    """Write the job's log to stdout until it ends. A lost connection is opened again and continues where it broke."""
    printed, lost_since = 0, None
    while True:
        seen = 0
        stream = client.tail_job_logs(job_id)
        pending = None
        try:
            while True:
                pending = pending or asyncio.ensure_future(anext(stream, None))
                done, _ = await asyncio.wait({pending}, timeout=silence_s)
                if not done:  # silence: does the dashboard still answer?
                    await asyncio.to_thread(_info, client, job_id)
                    continue
                text, pending = pending.result(), None
                if text is None:
                    break
                fresh = text[max(0, printed - seen) :]  # every connection starts at the log's beginning
                seen += len(text)
                if fresh:
                    sys.stdout.write(fresh)
                    sys.stdout.flush()
                    printed, lost_since = seen, None
            info = await asyncio.to_thread(_info, client, job_id)
            if info.status.is_terminal():
                return
        except (RuntimeError, UserError, aiohttp.ClientError, OSError) as error:
            if pending is not None:
                pending.cancel()
            lost_since = lost_since or time.monotonic()
            if time.monotonic() - lost_since > patience_s:
                raise UserError(
                    f"lost the log of job {job_id} for {patience_s:.0f} s ({error}); the job itself may go "
                    f"on: {_command('logs', job_id, client)}"
                ) from None
            echo(f"connection to {client.get_address()} lost ({error}); trying again")
            await asyncio.sleep(3)
        await asyncio.sleep(0.3)  # the log's stream may end a moment before the job's state says so


def _wait_terminal(client: JobSubmissionClient, job_id: str, deadline_s: float) -> JobDetails:
    start = time.monotonic()
    while not (job := _info(client, job_id)).status.is_terminal():
        if time.monotonic() - start > deadline_s:
            raise UserError(
                f"waited {deadline_s:.0f} s for job {job_id} to end, it is {job.status.value.lower()}; see "
                f"{_command('logs', job_id, client)}"
            )
        time.sleep(0.5)
    return job


def _exit_status(job: JobDetails, echo: Echo) -> int:
    if job.status == JobStatus.FAILED:
        if job.driver_exit_code is None:  # the run never started or was killed with its node: the log doesn't say why
            echo(f"job {job.submission_id} failed: {job.message}")
        return job.driver_exit_code or 1
    return STOPPED_EXIT_STATUS if job.status == JobStatus.STOPPED else 0
