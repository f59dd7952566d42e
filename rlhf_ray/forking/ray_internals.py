"""All that `forking` uses of Ray beyond its public interface, in one place. tests/test_ray_internals.py fails where Ray changes it.

Nothing here imports Ray before it is called: a fork server must not (`forking.fork_server`).
"""

from __future__ import annotations

import os
import shlex
from contextlib import contextmanager, suppress
from pathlib import Path

#: what Ray's worker script imports, and what is imported in a worker of a stage ("all": of every one)
WORKER_MODULES = {
    "all": ("ray.actor", "ray._private.node", "ray._private.parameter", "ray._private.runtime_env.setup_hook"),
    "serving": ("ray.serve._private.controller", "ray.serve._private.proxy"),
}
PRELOADS = "RAY_LD_PRELOAD_ON_WORKERS"  # whether workers keep LD_PRELOAD, by which Ray's own processes get another allocator
ACTOR_TITLE = b"ray::"  # how a worker's process is named once it has answered


@contextmanager
def no_ids_drawn():
    """Ray's generator of ids goes on alike in all forks of a process that has drawn one. A class of actors draws one."""
    import ray.actor

    drawn = ray.actor.ActorClassID

    class Drawn(drawn):
        @classmethod
        def from_random(cls):
            return drawn(os.urandom(drawn.size()))

    ray.actor.ActorClassID = Drawn
    try:
        yield
    finally:
        ray.actor.ActorClassID = drawn


def is_known_to_ray(worker: int) -> bool:
    """Ray names a worker's process when that has answered."""
    try:
        with open(f"/proc/{worker}/cmdline", "rb") as file:
            return file.read(len(ACTOR_TITLE)) == ACTOR_TITLE
    except OSError:
        return False


def follow_threads(torch) -> None:
    """Ray tells a worker how many threads to use by OMP_NUM_THREADS, which torch reads when it is loaded; here it already is."""
    import ray._private.utils as utils

    set_variable = utils.set_omp_num_threads_if_unset

    def set_threads() -> bool:
        was_unset, threads = set_variable(), os.environ.get("OMP_NUM_THREADS", "")
        if threads.isdigit():
            torch.set_num_threads(int(threads))
        return was_unset

    utils.set_omp_num_threads_if_unset = set_threads


def raylet_of(node: str) -> tuple[Path, list[str]] | None:
    """The folder in /proc of that node's raylet, if it is a process of this machine, and the Pythons that it starts workers by."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or is somebody else's
            name, *arguments = os.fsdecode((process / "cmdline").read_bytes()).split("\0")
            if os.path.basename(name) == "raylet" and f"--node_id={node}" in arguments:
                starts = [each.partition("=")[2] for each in arguments if each.startswith("--python_worker_command=")]
                return process, [shlex.split(each)[0] for each in starts]
    return None
