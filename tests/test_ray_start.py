"""Ray starts where a program calls us, or says in words why it does not: threads, homes, tokens, a Ray that hangs."""

import os
import stat
import subprocess
import sys
import time
from contextlib import nullcontext

import pytest

from rlhf_ray.actors import ray_folder, ray_start
from rlhf_ray.actors.ray_start import prepare_home, protect, start_own_ray, start_ray
from rlhf_ray.errors import RunFailed, StageStopped

pytestmark = pytest.mark.ray

ONE_TASK = """
import os, sys, threading
from rlhf_ray.actors.session import ray_session
def work():
    import ray
    with ray_session(None, stages=()):
        @ray.remote
        def double(value):
            return 2 * value
        print("twice 21 is", ray.get(double.remote(21), timeout=120))
        if "run" in sys.argv:
            run_beside(ray)
def run_beside(ray):
    from rlhf_ray import UserError, load_recipe, run
    try:
        run(load_recipe("demo"), "run")
    except UserError as error:
        print("told:", error)
    print("still there:", ray.is_initialized(), ray.get(ray.put(7)))
if sys.argv[1] == "thread":
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
else:
    work()
"""


def python(code, *arguments, cwd, timeout=400, **environment):
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH") and name != "XDG_CACHE_HOME"}
    return subprocess.run([sys.executable, "-c", code, *arguments], cwd=cwd, env=own | environment, capture_output=True, text=True,
                          timeout=timeout, check=False)  # fmt: skip


def fail(words):
    raise Exception(words)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.thorough
def test_in_another_thread_where_a_run_is_refused_and_the_token_is_its_owners_alone(tmp_path):
    """A run is one Ray's: it is refused in a process that has one, whoever started that, and that one goes on."""
    (tmp_path / "home").mkdir()
    answer = python(ONE_TASK, "thread", "run", cwd=tmp_path, HOME=str(tmp_path / "home"))
    assert "twice 21 is 42" in answer.stdout, answer.stderr
    assert "told: this process is connected to a Ray already" in answer.stdout, answer.stderr
    assert "call ray.shutdown() first" in answer.stdout and "still there: True 7" in answer.stdout
    assert not (tmp_path / "run").exists() and "Traceback" not in answer.stderr
    token = tmp_path / "home" / ".ray" / "auth_token"
    assert mode(token) == 0o600 and len(token.read_text()) == 64
    assert [file.name for file in token.parent.iterdir()] == ["auth_token"]


@pytest.mark.thorough
def test_with_a_home_that_cannot_be_written(tmp_path):
    answer = python(ONE_TASK, "main", cwd=tmp_path, HOME="/proc/nobody")
    assert "twice 21 is 42" in answer.stdout, answer.stderr
    assert "the home folder /proc/nobody can't be written" in answer.stderr and "Traceback" not in answer.stderr


NO_HOME = """
import pwd
def unknown(uid):
    raise KeyError(f"getpwuid(): uid not found: {uid}")
pwd.getpwuid = unknown
import os, pathlib
from rlhf_ray.actors.ray_start import prepare_home
prepare_home()
place = pathlib.Path("~/ray_results").expanduser()
print(oct(os.stat(place.parent).st_mode), os.access(place.parent, os.W_OK), len(os.environ.get("RAY_AUTH_TOKEN", "")))
"""


def test_for_a_user_whom_nobody_knows_and_who_has_no_home(tmp_path, monkeypatch):
    """As containers run under any number; Ray Train looks for the home folder when it is imported."""
    monkeypatch.delenv("HOME", raising=False)
    answer = python(NO_HOME, cwd=tmp_path, TMPDIR=str(tmp_path))
    assert answer.stdout == "0o40700 True 64\n", answer.stderr
    assert "there is no home folder; caches of compiled code go to" in answer.stderr


def test_a_token_that_others_can_read_is_closed_or_told_of(tmp_path, monkeypatch, caplog):
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    for rights in (0o644, 0o640, 0o604, 0o666):
        token.write_text("0" * 64)
        token.chmod(rights)
        prepare_home()
        assert mode(token) == 0o600 and token.read_text() == "0" * 64
    assert not caplog.records
    token.chmod(0o644)
    monkeypatch.setattr(os, "geteuid", lambda: token.stat().st_uid + 1)
    protect(token)
    assert mode(token) == 0o644 and f"chmod 600 {token}" in caplog.text and "mode 644" in caplog.text


def test_a_token_is_made_once_by_whoever_comes_first(tmp_path, monkeypatch):
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    code = "from rlhf_ray.actors.ray_start import prepare_home; prepare_home()"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    both = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(2)]
    assert [each.wait(120) for each in both] == [0, 0]
    token = tmp_path / ".ray" / "auth_token"
    made = token.read_text()
    assert mode(token) == 0o600 and len(made) == 64 and [file.name for file in token.parent.iterdir()] == ["auth_token"]
    prepare_home()
    assert token.read_text() == made and "RAY_AUTH_TOKEN" not in os.environ


HANGING = """
import os, signal, sys, threading, time
from pathlib import Path
import typer
from rlhf_ray.actors import ray_start
from rlhf_ray.actors.session import ray_session
from rlhf_ray.cli.command_errors import in_words
clock, ahead_s, ray_start.TELL_S = time.monotonic, 0.0, 1.0
time.monotonic = lambda: clock() + ahead_s  # for Ray and for us
def children(parent):
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, rest = status.read_text().split("(", 1)[1].rsplit(") ", 1)
        except OSError:
            continue
        if int(rest.split()[1]) == parent:
            found.append((int(status.parent.name), name))
    return found
def stop():
    global ahead_s
    while True:
        for process, name in children(os.getpid()):
            if name == sys.argv[1]:
                os.kill(process, signal.SIGSTOP)
                ahead_s = 290.0  # of the 300 s that a start may take
                print("stopped", name, flush=True)
                return
        time.sleep(0.01)
threading.Thread(target=stop, daemon=True).start()
@in_words
def command():
    with ray_session(None, stages=()):
        print("started")
app = typer.Typer()
app.command()(command)
app([])
"""


@pytest.mark.parametrize("process", ["raylet", "gcs_server"])
@pytest.mark.thorough
def test_a_ray_that_hangs_ends_in_words(tmp_path, process):
    (tmp_path / "home").mkdir()
    started = time.monotonic()
    answer = python(HANGING, process, cwd=tmp_path, HOME=str(tmp_path / "home"))
    assert f"stopped {process}" in answer.stdout and "started" not in answer.stdout
    assert answer.returncode == 1 and time.monotonic() - started < 300
    assert "rlhf-ray: Ray did not start" in answer.stderr and "Traceback" not in answer.stderr, answer.stderr


def test_folders_of_killed_runs_go_and_no_others(tmp_path):
    """tests/soak.py has the whole of it: a run that ends, and one that is killed."""
    gone, kept = subprocess.Popen(["true"]), tmp_path / "session_2026-01-01_x_1"
    who = ray_folder._who(gone.pid)  # it is a zombie until it is waited for
    gone.wait()
    pid, start, host, container = who.split()
    words = {
        "gone": who, "again": f"{os.getpid()} 1 {host} {container}",  # a process has got the number since
        "mine": ray_folder._who(os.getpid()), "host": f"{pid} {start} 00000000 {container}",  # initial namespaces have one number
        "container": f"{pid} {start} {host} pid:[1]", "torn": "", "short": f"{pid} {start}",
    }  # fmt: skip
    for name, text in words.items():
        (tmp_path / f"session_2026_{name}" / "logs").mkdir(parents=True)
        (tmp_path / f"session_2026_{name}" / ray_folder.OWNER).write_text(text)
    kept.mkdir()  # of another Ray, or of a run that failed
    (tmp_path / "session_latest").symlink_to(tmp_path / "session_2026_gone")
    assert {path.name for path in ray_folder.remove_left(tmp_path)} == {"session_2026_gone", "session_2026_again"}
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {f"session_2026_{name}" for name in ("mine", "host", "container", "torn", "short")} | {kept.name}


@pytest.mark.parametrize(("error", "stays"), [(None, False), (StageStopped("asked to"), False), (ValueError("a bug"), True)])
def test_the_folder_of_a_run_stays_where_it_failed(tmp_path, monkeypatch, error, stays):
    session = tmp_path / "session_2026_1"
    (session / "sockets").mkdir(parents=True)
    monkeypatch.setattr(ray_folder.ray, "nodes", lambda: [{"RayletSocketName": str(session / "sockets" / "raylet")}])
    ended = []
    with pytest.raises(type(error)) if error else nullcontext(), ray_folder.session_cleared(lambda: ended.append(session.exists())):
        assert ray_folder.remove_left(tmp_path) == [] and session.exists() and not ended
        if error:
            raise error
    assert session.exists() == stays and not (session / ray_folder.OWNER).exists()
    assert ended == [True]  # before its folder goes


def test_a_ray_whose_folder_is_not_found_is_shut_down(monkeypatch):
    """Or whose run is interrupted before it begins: the next run of this process would be refused."""
    monkeypatch.setattr(ray_folder.ray, "nodes", lambda: [][0])
    ended = []
    with pytest.raises(IndexError), ray_folder.session_cleared(lambda: ended.append(True)):
        ended.append("begun")
    assert ended == [True]


def test_a_folder_that_ray_cannot_make_is_told(tmp_path):
    (tmp_path / "home").mkdir()
    answer = python(HANGING, "nothing", cwd=tmp_path, HOME=str(tmp_path / "home"), RAY_TMPDIR="/proc/nobody")
    assert answer.returncode == 1 and "Traceback" not in answer.stderr, answer.stderr
    assert "rlhf-ray: Ray did not start: " in answer.stderr and "set RAY_TMPDIR" in answer.stderr.replace("\n", " ")


SERVERS_RAY = """
import contextlib, os, stat, sys, threading
import ray
from rlhf_ray.serving.server_ray import check_ray, start_ray
def init(**options):
    token = os.path.expanduser("~/.ray/auth_token")
    print(oct(os.stat(token).st_mode) if os.path.exists(token) else "token " + str(len(os.environ["RAY_AUTH_TOKEN"])))
    raise Exception("The current node timed out during startup")
check_ray()
ray.init = init
with contextlib.ExitStack() as stack:
    try:
        start_ray(1, stack, {})
    except Exception as error:
        print(type(error).__name__, error)
"""


def test_the_ray_of_a_server_starts_as_one_of_a_run(tmp_path):
    """With a token of its owner's, where the home folder can't be written too; and what keeps it from starting is a sentence."""
    (tmp_path / "home").mkdir()
    for home, token in ((tmp_path / "home", "0o100600"), (tmp_path / "nobody", "token 64")):
        answer = python(SERVERS_RAY, cwd=tmp_path, HOME=str(home), RLHF_RAY_FORK="off")
        assert answer.stdout.splitlines()[0] == token, answer.stderr
        assert "RunFailed Ray did not start: The current node timed out during startup; see /" in answer.stdout
        assert "Traceback" not in answer.stderr


def test_a_ray_whose_processes_were_too_late_for_each_other_is_started_again(monkeypatch, caplog):
    calls = []

    def init(**options):
        calls.append(options)
        if len(calls) < 3:
            raise Exception("The current node timed out during startup. This could happen because ...")

    monkeypatch.setattr(ray_start.ray, "init", init)
    start_ray({"address": "local"}, 300)()
    assert calls == [{"address": "local"}] * 3 and caplog.text.count("they are started again") == 2
    for deadline_s, attempts in ((300, 3), (50, 1)):  # what is left of it must be enough for another one
        calls[:] = []
        monkeypatch.setattr(ray_start.ray, "init", lambda **options: calls.append(1) or fail("timed out during startup"))
        with pytest.raises(RunFailed, match="Ray did not start: timed out during startup"):
            start_own_ray({"address": "local"}, deadline_s)
        assert len(calls) == attempts
    calls[:] = []
    monkeypatch.setattr(ray_start.ray, "init", lambda **options: calls.append(1) or fail("no such option"))
    with pytest.raises(RunFailed, match="no such option"):
        start_own_ray({"address": "local"}, 300)
    assert len(calls) == 1
