"""Workers of Ray as forks of one process, beside plain ones."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import ray
from processes import descendants, server_of, wait_for
from tiny import tiny_recipe, write_start

from rlhf_ray.actors.ppo_stage import ray_roles, run_ppo
from rlhf_ray.actors.session import ray_session, worker_environment
from rlhf_ray.actors.wait import Waiter
from rlhf_ray.forking import forked_actors, ray_internals
from rlhf_ray.forking.forked_actors import inherited_variables
from rlhf_ray.runs.run_folder import RunFolder

pytestmark = pytest.mark.ray


@pytest.mark.thorough
def test_forked_and_plain_workers_are_alike():
    """What a worker computes may depend on: threads, folder, paths, environment; and seeds that nobody set are its own."""

    def facts():
        import numpy
        import torch
        from ray._raylet import UniqueID

        return {
            "threads": torch.get_num_threads(),
            "folder": os.getcwd(),
            "paths": {path for path in sys.path if "_vendor" not in path},
            "environment": {name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            "processes": (os.getppid(), os.getpid()),
            "seeds": (torch.initial_seed(), float(numpy.random.random()), UniqueID.from_random().hex()),
            "oom": open("/proc/self/oom_score_adj").read(),
        }

    def found(stages):
        with ray_session(None, stages=stages, spins=False):
            if stages:  # all workers are forks: actors need nothing of their own
                with forked_actors.forked_actors(worker_environment(spins=True)) as runtime_env:
                    assert runtime_env == {} and "py_executable" in ray.get_runtime_context().runtime_env
            return found_in_session()

    def found_in_session():
        task = ray.remote(max_calls=1)(facts)  # a process each
        kinds = [
            {"num_cpus": 1},
            {"num_cpus": 2},
            {"num_cpus": 0, "runtime_env": {"env_vars": {"OMP_NUM_THREADS": "2"}}},
        ]
        return [ray.get(task.options(**kind).remote(), timeout=120) for kind in kinds]

    forked, plain = found(("supervised", "ppo")), found(())
    parents, processes = zip(*(each.pop("processes") for each in forked), strict=True)
    assert len(set(parents)) == 1 and len(set(processes)) == 3
    assert all(len(set(seeds)) == 3 for seeds in zip(*(each.pop("seeds") for each in forked), strict=True))
    for each in plain:
        assert each.pop("processes")[0] != parents[0] and each.pop("seeds")
    assert [each["threads"] for each in forked] == [1, 2, 2]
    assert forked == plain


@pytest.fixture(scope="module")
def running_ray(tmp_path_factory):
    """The address of a Ray that others have started, with an environment that is not this process's."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["ray", "start", "--head", "--block", f"--port={port}", "--num-cpus=2", "--include-dashboard=false",
               "--disable-usage-stats"]  # fmt: skip
    environment = os.environ | {
        "MALLOC_ARENA_MAX": "3",
        "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}",
    }
    path = tmp_path_factory.mktemp("ray") / "ray.log"
    with open(path, "w") as log:
        head = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        wait_for(lambda: "Ray runtime started" in path.read_text(), seconds=60)
        yield f"127.0.0.1:{port}"
    finally:
        head.terminate()
        head.wait(60)


@pytest.mark.thorough
def test_ppos_actors_on_a_ray_that_runs_here_are_forks(running_ray, tmp_path):
    """Of a server with the environment that Ray's workers inherit, not the command's."""
    recipe = tiny_recipe()
    folder = write_start(recipe, RunFolder(tmp_path / "run"))
    with ray_session(running_ray):
        assert inherited_variables()["MALLOC_ARENA_MAX"] == "3"
        with ray_roles(recipe, folder, Waiter(60.0, "look why")):
            actors = [process for process in descendants(os.getpid()) if is_actor(process)]
            parents = {server_of(actor) for actor in actors}
            commands = [Path(f"/proc/{parent}/cmdline").read_text() for parent in parents]
        assert len(actors) == 6 and len(parents) == 1 and "rlhf_ray.forking.fork_server" in commands[0], commands


def is_actor(process):
    try:
        name = Path(f"/proc/{process}/cmdline").read_text()
    except OSError:
        return False
    return name.startswith("ray::") and not name.startswith(("ray::Dashboard", "ray::RuntimeEnv", "ray::IDLE"))


@pytest.mark.thorough
def test_elsewhere_they_are_not(running_ray, tmp_path):
    """Several nodes; a raylet in other namespaces; one that starts another Python; one that is not to be seen here."""
    with ray_session(running_ray):
        nodes = ray.nodes()
        for where, name, other in (
            (ray, "nodes", lambda: [*nodes, nodes[0] | {"NodeID": "another"}]),
            (forked_actors, "surroundings", lambda process="self": [process]),
            (sys, "executable", "/usr/bin/python-of-others"),
            (ray_internals, "Path", lambda path: tmp_path),
        ):
            assert inherited_variables() is not None
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(where, name, other)
                assert inherited_variables() is None, name
                with forked_actors.forked_actors(worker_environment(spins=True)) as runtime_env:
                    assert runtime_env == {}, name


@pytest.mark.slow
def test_ppo_ends_in_the_same_bits_forked_or_not(tmp_path, monkeypatch):
    weights = []
    for forks in ("on", "off"):
        monkeypatch.setenv("RLHF_RAY_FORK", forks)
        folder = write_start(tiny_recipe(), RunFolder(tmp_path / forks))
        with ray_session(None):
            run_ppo(tiny_recipe(), folder, lambda event: None)
        weights.append((folder.stage("ppo").model / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
