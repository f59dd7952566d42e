"""Workers as forks of one process, without Ray: a script in the worker's place."""

import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile

import pytest
from processes import alive, server_of, wait_for
from tiny import tiny_recipe

from rlhf_ray.actors import supervised as launch
from rlhf_ray.actors.session import worker_environment
from rlhf_ray.config.threads import ALONE_ENVIRONMENT
from rlhf_ray.forking import fork_client
from rlhf_ray.forking import server_process as forking
from rlhf_ray.forking.fork_client import surroundings
from rlhf_ray.forking.fork_server import why_not
from rlhf_ray.forking.server_process import fork_server

SCRIPT = """
import os, sys, time
what = sys.argv[1]
print("worker", os.getpid(), os.getcwd(), os.environ.get("COLOUR"), sys.argv[1:], sys.path[0], flush=True)
if what == "stay":
    time.sleep(60)
if what == "abort":
    os.abort()
if what == "raise":
    raise LookupError("as it happens")
sys.exit(int(what))
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "worker.py"
    path.write_text(SCRIPT)
    return path


@pytest.fixture
def python(monkeypatch):
    """What Ray would start in place of Python. The server is for no stage, and so imports little."""
    monkeypatch.setattr(forking, "forks_here", lambda stages: True)
    with fork_server((), {}) as python:
        yield shlex.split(python)


def start(python, script, *arguments, cwd=None, **environment):
    return subprocess.Popen(
        [*python, str(script), *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd,
        env=os.environ | environment,
    )  # fmt: skip


def test_a_worker_has_its_clients_command_folder_environment_and_streams(python, script, tmp_path):
    client = start(python, script, "3", "and more", cwd=tmp_path, COLOUR="green")
    out, errors = client.communicate(timeout=60)
    words = out.split()
    assert words[0] == "worker" and int(words[1]) != client.pid
    assert out.endswith(f"{tmp_path} green ['3', 'and more'] {script.parent}\n")
    assert client.returncode == 3 and errors == ""


def test_a_worker_that_raises_says_so(python, script):
    client = start(python, script, "raise")
    _, errors = client.communicate(timeout=60)
    assert client.returncode != 0 and "LookupError: as it happens" in errors


def test_worker_and_client_end_together(python, script):
    clients = [start(python, script, "stay") for _ in range(3)]
    workers = [int(client.stdout.readline().split()[1]) for client in clients]
    assert len({server_of(worker) for worker in workers}) == 1
    os.killpg(os.getpgid(workers[0]), signal.SIGKILL)  # as Ray ends one: with its group
    assert clients[0].wait(20) == 256 - signal.SIGKILL
    clients[1].kill()  # as Ray ends one that is late
    wait_for(lambda: not alive(workers[1]))
    assert alive(workers[2]) and clients[2].poll() is None
    os.kill(workers[2], signal.SIGKILL)
    assert clients[2].wait(20) != 0


def test_without_its_server_a_worker_works_on_and_others_start_as_ever(python, script):
    client = start(python, script, "stay")
    worker = int(client.stdout.readline().split()[1])
    os.kill(server_of(worker), signal.SIGKILL)
    other = start(python, script, "5")
    out, errors = other.communicate(timeout=60)
    assert other.returncode == 5 and int(out.split()[1]) == other.pid, "the client became the worker"
    assert "imports everything itself" in errors
    assert alive(worker) and client.poll() is None
    os.kill(worker, signal.SIGKILL)
    assert client.wait(20) == 1


def test_after_three_crashes_workers_start_as_ever(python, script):
    def forked():
        client = start(python, script, "0")
        return int(client.communicate(timeout=60)[0].split()[1]) != client.pid

    for crash in ("abort", "raise", "1", "abort"):  # status 1 is that of an actor that Ray ends
        start(python, script, crash).wait(60)
    assert forked()
    for crash in ("abort", "raise", "abort"):
        start(python, script, crash).wait(60)
    assert not forked()


@pytest.mark.thorough
def test_the_server_does_not_grow_with_the_workers_that_it_has_forked(python, script):
    def worker():
        client = start(python, script, "stay")
        number = int(client.stdout.readline().split()[1])
        server = server_of(number)
        os.kill(number, signal.SIGKILL)
        client.communicate(timeout=60)
        return server

    def held(server):
        with open(f"/proc/{server}/smaps_rollup") as file:
            memory = next(int(line.split()[1]) for line in file if line.startswith("Rss:"))
        return memory, len(os.listdir(f"/proc/{server}/fd"))

    for _ in range(5):
        server = worker()
    memory, files = held(server)
    for _ in range(40):
        assert worker() == server
    now, open_now = held(server)
    assert open_now <= files + 1 and now < memory + 256  # KiB; one descriptor: the last client's end may not be seen yet


@pytest.mark.parametrize("other", [{"GOMP_SPINCOUNT": "5"}, {"PYTHONPATH": "/elsewhere"}])
def test_a_worker_whose_libraries_would_load_otherwise_starts_as_ever(python, script, other):
    client = start(python, script, "0", **other, OMP_NUM_THREADS="7")
    out, errors = client.communicate(timeout=60)
    assert int(out.split()[1]) == client.pid and f"other values of {next(iter(other))};" in errors


NOISY_SERVER = """
from rlhf_ray.forking import fork_server, imports
imports.LIBRARIES["noisy"], imports.ACTORS["noisy"] = ("noisy",), ()
fork_server.main()
"""


def test_a_library_that_sets_variables_when_it_is_imported_keeps_nobody_from_forking(script, tmp_path):
    """As scikit-learn does, which transformers imports where it is installed. The workers' environment has none of them."""
    (tmp_path / "noisy.py").write_text("import os; os.environ.setdefault('KMP_OF_THIS_LIBRARY', 'FALSE')")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(tmp_path), os.environ.get("PYTHONPATH", "")))}
    path = tempfile.mkdtemp(dir="/tmp") + "/s"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        command = [sys.executable, "-c", NOISY_SERVER, str(listener.fileno()), path, "noisy"]
        server = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[listener.fileno()], env=environment)
    try:
        command = [sys.executable, "-I", "-S", fork_client.__file__, path, sys.executable]
        client = start(command, script, "0", PYTHONPATH=environment["PYTHONPATH"])
        out, errors = client.communicate(timeout=100)
        assert errors == "" and int(out.split()[1]) != client.pid
    finally:
        server.communicate(timeout=60)  # it ends with its standard input, and its folder with it


def test_every_kind_of_worker_can_be_a_fork(monkeypatch):
    """Variables of a session's workers, of a generator, of a supervised stage's; and of one that can't."""
    for name, value in (worker_environment() | ALONE_ENVIRONMENT).items():
        monkeypatch.setenv(name, value)
    for more in ({}, ALONE_ENVIRONMENT, launch._worker_environment(tiny_recipe().sft)):
        assert why_not(dict(os.environ) | more, surroundings(), os.environ) is None
    assert "HF_HOME" in why_not(dict(os.environ) | {"HF_HOME": "/elsewhere"}, surroundings(), os.environ)


def test_a_worker_in_another_namespace_starts_as_ever(python, script):
    if subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode:
        pytest.skip("no right to make a namespace")
    client = start(["unshare", "--net", *python], script, "0")
    out, errors = client.communicate(timeout=60)
    assert int(out.split()[1]) == client.pid and "in another container" in errors


def test_a_worker_computes_on_its_clients_cores(python, tmp_path):
    script = tmp_path / "cores.py"
    script.write_text("import os; print(sorted(os.sched_getaffinity(0)))")
    core = str(max(os.sched_getaffinity(0)))
    out, _ = start(["taskset", "-c", core, *python], script).communicate(timeout=60)
    assert out == f"[{core}]\n"


def test_workers_of_one_ray_have_one_parent_and_those_of_another_another(python, script):
    clients = [start(python, script, "stay", RAY_JOB_ID=job) for job in ("01", "02", "01")]
    workers = [int(client.stdout.readline().split()[1]) for client in clients]
    one, other, same = map(server_of, workers)
    assert one == same != other and server_of(one) == server_of(other)
    for client in clients:
        client.kill()
        client.wait(20)


def test_the_server_ends_with_whoever_started_it(script, tmp_path):
    code = (
        "from rlhf_ray.forking import server_process as forking; import time; forking.forks_here = lambda stages: True\n"
        "with forking.fork_server((), {}) as python: print(python, flush=True); time.sleep(60)"
    )
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    python = shlex.split(owner.stdout.readline())
    client = start(python, script, "stay")
    worker = int(client.stdout.readline().split()[1])
    branch = server_of(worker)
    server = server_of(branch)
    owner.kill()
    wait_for(lambda: not alive(branch) and not alive(server))
    assert not os.path.exists(os.path.dirname(python[4]))  # where its sockets were
    os.kill(worker, signal.SIGKILL)  # Ray's own ends it by then
    client.wait(20)


def test_where_there_is_no_fork_server(monkeypatch, tmp_path):
    monkeypatch.setattr(forking, "GPU_DEVICES", ())
    assert forking.forks_here(["ppo"]) and not forking.forks_here([])
    monkeypatch.setattr(forking, "GPU_DEVICES", (str(tmp_path),))
    assert not forking.forks_here(["ppo"])
    monkeypatch.setattr(forking, "GPU_DEVICES", ())
    monkeypatch.setenv("RLHF_RAY_FORK", "off")
    assert not forking.forks_here(["ppo"])


def test_a_path_too_long_for_a_socket_is_no_obstacle(monkeypatch, tmp_path, python):
    deep = tmp_path / ("d" * 120)
    deep.mkdir()
    monkeypatch.setattr(forking.tempfile, "tempdir", str(deep))
    with fork_server((), {}) as other:
        assert other is None
    assert not list(deep.iterdir())
