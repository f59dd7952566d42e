"""Trials of how processes start (`bench.trials`)."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from typing import Any, cast

from rlhf_ray.bench.trial import trial


def imports() -> None:
    """What every role imports, in a process of its own."""

    def process(first: str) -> None:
        code = f"{first}; import ray, torch, rlhf_ray.models.load"
        subprocess.run([sys.executable, "-c", code], check=True, stderr=subprocess.DEVNULL)

    plain, paused = partial(process, "pass"), partial(process, "import gc; gc.disable()")
    trial("imports of a role without garbage collection", "kept", plain, paused, repeats=5)


def workers() -> None:
    """Six actors on a Ray that runs, until each has what PPO's roles import."""
    import ray

    from rlhf_ray.actors.session import ray_session, worker_environment
    from rlhf_ray.actors.worker_start import fork_server

    class Role:
        def ready(self) -> None:
            import rlhf_ray.models.load
            import rlhf_ray.roles.generator  # noqa: F401

    def six(**runtime_env) -> None:
        actors = [ray.remote(Role).options(num_cpus=0, runtime_env=runtime_env).remote() for _ in range(6)]
        ray.get([actor.ready.remote() for actor in actors], timeout=300)
        for actor in actors:
            ray.kill(cast(Any, actor))  # Ray annotates a handle as one or the actor's class

    with fork_server(["ppo"], worker_environment()) as python, ray_session(None, stages=()):
        trial("six workers of Ray as forks of one process", "kept", six, partial(six, py_executable=python), repeats=3)
