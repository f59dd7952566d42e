"""PPO's actors as forks of one process on a Ray that was there before the command (`forking.server_process`).

Only where the server can be what Ray's workers there are: Ray is one node, whose raylet is a process on this machine, in the
command's own user, namespaces and control group, and starts the command's own Python. Elsewhere actors start as usual.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf_ray.forking.fork_client import surroundings
from rlhf_ray.forking.ray_internals import PRELOADS, raylet_of
from rlhf_ray.forking.server_process import fork_server


@contextmanager
def forked_actors(environment: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """The runtime environment that makes forks of actors for the body of the `with`; {}: they are started as all workers are.

    environment: variables that the actors get.
    """
    inherited = inherited_variables()
    with fork_server(() if inherited is None else ("ppo",), environment, inherited or {}) as python:
        yield {} if python is None else {"env_vars": dict(environment), "py_executable": python}


def inherited_variables() -> dict[str, str] | None:
    """What actors of the Ray that this process is connected to find in their environment; None: they can't be forks, or are."""
    import ray

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
    if variables.get(PRELOADS, "0") == "0":  # Ray's own processes have another allocator
        variables.pop("LD_PRELOAD", None)
    # A submitted job's folder: Ray puts it in front of a worker's path, and of this process's, as of every process of the job.
    folder = {name: os.environ[name] for name in ("PYTHONPATH",) if "working_dir" in job and name in os.environ}
    return variables | (job.get("env_vars") or {}) | folder


def _raylet(node: str) -> Path | None:
    """Its folder in /proc, if it is one that a fork of a process of this command could stand beside."""
    found = raylet_of(node)
    if found is None or found[1] != [sys.executable]:
        return None
    process = found[0]
    try:
        alike = process.stat().st_uid == os.geteuid() and surroundings(process.name) == surroundings()
    except OSError:  # it has just ended, or is somebody else's
        return None
    return process if alike else None
