"""One Ray for the tests of several files: its start, and the import of all that workers need, take as long as dozens of tests."""

import os
import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path

import pytest

_running = ExitStack()


def faults_file() -> Path:
    """Where its actors read their faults (`actors.faults`). Without the file there are none."""
    return Path(tempfile.gettempdir()) / f"rlhf_ray_faults_{os.getpid()}" / "faults.json"


def start() -> None:
    """A Ray of two CPUs whose workers are forks of one process, unless it runs. They find modules that lie beside this file."""
    import ray

    from rlhf_ray.actors import faults
    from rlhf_ray.actors.session import ray_session

    if ray.is_initialized():
        return
    faults_file().parent.mkdir(mode=0o700, exist_ok=True)
    _running.callback(shutil.rmtree, faults_file().parent, ignore_errors=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(faults.VARIABLE, str(faults_file()))
        patch.setenv("PYTHONPATH", os.path.dirname(__file__), prepend=os.pathsep)
        patch.setenv("RLHF_RAY_NUM_CPUS", "2")
        _running.enter_context(ray_session(None, stages=("supervised", "ppo")))


def end() -> None:
    _running.close()
