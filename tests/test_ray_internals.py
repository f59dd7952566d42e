"""Ray's private names that forks depend on (`forking.ray_internals`): here a new Ray fails, in words, before a worker does.
test_ray_private.py has the others."""

import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_ray.forking import ray_internals


def ray_folder():
    import ray

    return Path(ray.__file__).parent


@pytest.mark.parametrize("module", [each for stage in ray_internals.WORKER_MODULES.values() for each in stage])
def test_a_module_that_workers_import_is_there(module):
    importlib.import_module(module)


def test_workers_import_them_themselves():
    """Else it would be a waste to import them ahead."""
    script = (ray_folder() / "_private" / "workers" / "default_worker.py").read_text()
    for module in ("ray._private.node", "ray._private.parameter", "ray._private.runtime_env.setup_hook"):
        assert f"import {module}" in script or f"from {module} import" in script, module


def test_classes_of_actors_draw_an_id_by_the_name_that_is_replaced():
    import ray.actor

    drawn = ray.actor.ActorClassID
    assert "ActorClassID.from_random()" in inspect.getsource(ray.actor)
    with ray_internals.no_ids_drawn():
        assert ray.actor.ActorClassID is not drawn
        ids = [ray.actor.ActorClassID.from_random() for _ in range(2)]
    assert ray.actor.ActorClassID is drawn
    assert all(type(each) is drawn for each in ids) and len({each.hex() for each in ids}) == 2


def test_ray_tells_a_worker_its_threads_by_the_function_that_is_followed(monkeypatch):
    import ray._private.utils as utils

    assert list(inspect.signature(utils.set_omp_num_threads_if_unset).parameters) == []
    (compiled,) = ray_folder().glob("_raylet*.so")
    assert b"set_omp_num_threads_if_unset" in compiled.read_bytes(), "the worker's loop calls it"
    said = []

    class Torch:
        set_num_threads = said.append

    monkeypatch.setattr(utils, "set_omp_num_threads_if_unset", lambda: True)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    ray_internals.follow_threads(Torch)
    assert utils.set_omp_num_threads_if_unset() is True and said == [3]


def test_what_is_read_of_rays_processes_is_what_ray_writes():
    """The raylet's arguments, the variable of its workers' allocator, the name of a worker that has answered."""
    services = (ray_folder() / "_private" / "services.py").read_text()
    assert "--python_worker_command=" in services and "--node_id=" in services
    assert ray_internals.PRELOADS in services
    (compiled,) = ray_folder().glob("_raylet*.so")
    assert ray_internals.ACTOR_TITLE in compiled.read_bytes()


def test_it_is_read_without_ray():
    """A fork server imports no Ray."""
    code = "import sys, rlhf_ray.forking.fork_server; print('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
