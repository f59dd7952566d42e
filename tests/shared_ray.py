"""One Ray for the tests of several files: its start, and the import of all that workers need, take as long as dozens of tests."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

_running = ExitStack()


def start() -> None:
    """A Ray of two CPUs whose workers are forks of one process, unless it runs."""
    import ray

    from rlhf_ray.actors.session import ray_session

    if not ray.is_initialized():
        with surroundings():
            _running.enter_context(ray_session(None, stages=("supervised", "ppo"), spins=False))


def end() -> None:
    _running.close()


@contextmanager
def surroundings() -> Iterator[None]:
    """The variables that it starts with. Workers find modules that lie beside this file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.path.dirname(__file__), prepend=os.pathsep)
        patch.setenv("RLHF_RAY_NUM_CPUS", "2")
        yield
