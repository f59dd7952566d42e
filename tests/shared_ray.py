"""One Ray for the tests of several files: its start, and the import of all that workers need, take as long as dozens of tests."""

import os
from contextlib import ExitStack

import pytest

_running = ExitStack()


def start() -> None:
    """A Ray of two CPUs whose workers are forks of one process, unless it runs. They find modules that lie beside this file."""
    import ray

    from rlhf_ray.actors.session import ray_session

    if ray.is_initialized():
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.path.dirname(__file__), prepend=os.pathsep)
        patch.setenv("RLHF_RAY_NUM_CPUS", "2")
        _running.enter_context(ray_session(None, stages=("supervised", "ppo")))


def end() -> None:
    _running.close()
