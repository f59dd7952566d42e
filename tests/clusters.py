"""The cluster scripts, run as a person would."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from rlhf_ray.config import Recipe

REPO = Path(__file__).resolve().parent.parent
CLUSTER = REPO / "cluster"


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [str(each.getsockname()[1]) for each in sockets]
    finally:
        for each in sockets:
            each.close()


def script(name, *arguments, env, timeout=120):
    return subprocess.run(
        ["bash", str(CLUSTER / name), *arguments],
        env=env,
        timeout=timeout,
        text=True,
        capture_output=True,
        stdin=subprocess.DEVNULL,
    )


def bare_env(home):
    """An environment without anybody's token or cluster, in which this test's Python is the active one."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "RLHF_RAY", "SLURM"))}
    binaries = Path(sys.executable).parent
    return env | {
        "HOME": str(home),
        "RLHF_RAY_STATE": str(home / "state"),
        "VIRTUAL_ENV": str(binaries.parent),
        "PATH": f"{binaries}:{env['PATH']}",
    }


def recipe(name="tiny", **sections):
    return Recipe.model_validate({"name": name, **sections})
