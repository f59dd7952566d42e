"""PPO's actors as forks of one process on a Ray that was there before the command (`forking.server_process`).

Only where the server can be what Ray's workers there are: Ray is one node, whose raylet is a process on this machine, in the
command's own user, namespaces and control group, and starts the command's own Python. Elsewhere actors start as ever.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray

from rlhf_ray.actors.session import worker_environment
from rlhf_ray.config.threads import ALONE_ENVIRONMENT
from rlhf_ray.forking.fork_client import surroundings
from rlhf_ray.forking.server_process import fork_server


@contextmanager
def forked_actors(*, spins: bool) -> Iterator[dict[str, Any]]:
    """The runtime environment that makes forks of actors for the body of the `with`; {}: they are started as all workers are.

    spins: the generators' threads are to (`actors.session.ray_session`).
    """
    inherited, variables = inherited_variables(), worker_environment() | (ALONE_ENVIRONMENT if spins else {})
    with fork_server(() if inherited is None else ("ppo",), variables, inherited or {}) as python:
        yield {} if python is None else {"env_vars": variables, "py_executable": python}


def inherited_variables() -> dict[str, str] | None:
    """What actors of the Ray that this process is connected to find in their environment; None: they can't be forks, or are."""
    context = ray.get_runtime_context()
    job, node = context.runtime_env, context.get_node_id()
    if "py_executable" in job or [each["NodeID"] for each in ray.nodes() if each["Alive"]] != [node]:
        return None
    raylet = _raylet(node)
    if raylet is None:
        return None
    try:
        pairs = os.fsdecode((raylet / "environ").read_bytes()).rstrip("\0").split("\0")
    except OSError:  # it has just ended
        return None
    variables = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
    if variables.get("RAY_LD_PRELOAD_ON_WORKERS", "0") == "0":  # Ray's own processes have another allocator
        variables.pop("LD_PRELOAD", None)
    # A submitted job's folder: Ray puts it in front of a worker's path, and of this process's, as of every process of the job.
    folder = {name: os.environ[name] for name in ("PYTHONPATH",) if "working_dir" in job and name in os.environ}
    return variables | job.get("env_vars", {}) | folder


def _raylet(node: str) -> Path | None:
    """Its folder in /proc, if it is one that a fork of a process of this command could stand beside."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or is somebody else's
            name, *arguments = os.fsdecode((process / "cmdline").read_bytes()).split("\0")
            if os.path.basename(name) != "raylet" or f"--node_id={node}" not in arguments:
                continue
            starts = [each.partition("=")[2] for each in arguments if each.startswith("--python_worker_command=")]
            alike = process.stat().st_uid == os.geteuid() and surroundings(process.name) == surroundings()
            return process if alike and [shlex.split(each)[0] for each in starts] == [sys.executable] else None
    return None
