"""Ray's own lines go to the run's log; ours and the user's stay where they are."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from processes import without_waiting

from rlhf_ray.actors import ray_lines
from rlhf_ray.actors.ray_lines import parted

CORE = b"[2026-11-30 01:56:22,123 E 4711 4712] core_worker.cc:2934: the raylet has died\n"
FATAL = b"[2026-11-30 01:56:22,123 C 4711 4712] gcs_client.cc:99:  Check failed: status.ok()\n"
GRPC = b"E1130 01:56:22.123456    4711 chttp2_transport.cc:1234] ipv4:10.0.0.1:6379: keepalive watchdog\n"


@pytest.mark.parametrize("line", [CORE, FATAL, GRPC])
def test_lines_of_rays_core(line):
    assert list(parted(line)) == [(line, True, line is FATAL)]


@pytest.mark.parametrize(
    "line",
    [
        b"[2026-11-30 01:56:22,123] INFO my_module: loaded\n",  # Python's logging, as people format it
        b"[W1130 01:56:22.1234 ProcessGroupGloo.cpp:757] Warning: of torch\n",
        b"W1130 01:56:22.123456 4711 my_own_server.cc:12] of another library\n",
        b" 42%|####      | 42/100\r", b"plain\n", b"\xff\xfe\n",
    ],
)  # fmt: skip
def test_lines_of_others(line):
    assert list(parted(line)) == [(line, False, False)]


def test_what_was_written_at_once_is_parted():
    both = list(parted(b"mine\n" + CORE + b"  of the same message\n" + GRPC))
    assert both == [(b"mine\n", False, False), (CORE + b"  of the same message\n", True, False), (GRPC, True, False)]


def filtered(tmp_path, *messages):
    """(log, terminal) of messages that are written one by one."""
    log = tmp_path / "ray.log"
    program = [sys.executable, "-I", "-S", ray_lines.__file__, str(log)]
    out, into = os.pipe2(os.O_DIRECT)
    with subprocess.Popen(program, stdin=out, stderr=subprocess.PIPE) as process:
        os.close(out)
        for message in messages:
            os.write(into, message)
        os.close(into)
        terminal = process.stderr.read()
    return log.read_bytes(), terminal


def test_a_message_keeps_together_and_the_next_one_is_parted_from_it(tmp_path):
    long = CORE[:-1] + b"x" * 5000 + b"\n"  # more than a pipe holds in one
    log, terminal = filtered(tmp_path, b"one\n", CORE, b"two\n", long, b"three\n")
    assert terminal == b"one\ntwo\nthree\n" and log == CORE + long


def test_the_end_of_the_process_is_told_to_both(tmp_path):
    trace = b"*** StackTrace Information ***\n"
    log, terminal = filtered(tmp_path, CORE, FATAL, trace)
    assert terminal == FATAL + trace and log == CORE + FATAL + trace
    signal = b"[2026-11-30 01:56:22,123 E 4711 4712] logging.cc:440: *** SIGSEGV received at time=1 on cpu 1 ***\n"
    assert filtered(tmp_path / "..", signal)[1] == signal


RUN = """
import logging, os, subprocess, sys, time
from pathlib import Path
import ray
from rlhf_ray.actors.session import ray_session

log = Path(sys.argv[1])
handler = logging.StreamHandler()          # a logger that the user made before
before = sys.stderr
with ray_session(None, stages=(), log=log):
    @ray.remote(max_retries=0)
    def dies():
        os._exit(1)

    try:
        ray.get(dies.remote())
    except ray.exceptions.WorkerCrashedError:
        print("caught", flush=True)
    logging.getLogger("ray.something").error("said by ray")
    os.write(2, b"[2026-11-30 01:56:22,123 E 1 1] core_worker.cc:1: said by the core\\n")
    print("stdout of ours", flush=True)
    print("stderr of ours", file=sys.stderr)
    handler.emit(logging.LogRecord("mine", 30, "f", 1, "a logger of ours", (), None))
    subprocess.run(["sh", "-c", "echo a child of ours >&2; printf 'no line end' >&2"], check=True)
    deadline = time.monotonic() + 20
    while "worker died" not in log.read_text() and time.monotonic() < deadline:
        time.sleep(0.1)
assert sys.stderr is before
print("after", file=sys.stderr)
"""


@pytest.mark.ray
@pytest.mark.thorough
def test_a_session_of_ray(tmp_path):
    log = tmp_path / "logs" / "ray.log"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "RLHF_RAY_NUM_CPUS": "1"}
    done = subprocess.run([sys.executable, "-c", RUN, str(log)], capture_output=True, text=True, env=environment, timeout=120,
                          check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["caught", "stdout of ours"]
    said = without_waiting(done.stderr.replace("no line end", "no line end\n"))
    assert sorted(said) == ["a child of ours", "a logger of ours", "after", "no line end", "stderr of ours"]
    written = log.read_text()
    for words in ("A worker died or was killed", "said by ray", "said by the core"):
        assert words in written, written
    assert Path(ray_lines.__file__).is_file()


SERVE = """
import contextlib, logging, os, sys
from pathlib import Path
from rlhf_ray.serving.server_ray import check_ray, start_ray

check_ray()
import ray
with contextlib.ExitStack() as stack:
    logs = start_ray(1, stack, {})
    os.write(2, b"[2026-11-30 01:56:22,123 E 1 1] core_worker.cc:1: said by the core\\n")
    logging.getLogger("ray.something").error("said by ray")
    logging.getLogger("ray.serve").error("said by serve")
    print("stderr of ours", file=sys.stderr)
    ray.shutdown()
print((Path(logs) / "of_the_server.log").read_text())
print("after", file=sys.stderr)
"""


@pytest.mark.ray
@pytest.mark.thorough
def test_a_server_keeps_rays_lines_out_of_the_terminal_too():
    """In a folder with a short name, for Ray's sockets."""
    with tempfile.TemporaryDirectory(prefix="rr", dir="/tmp", ignore_cleanup_errors=True) as short:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": short}
        command = [sys.executable, "-c", SERVE]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, check=False)
        left = list(Path(short).glob("rlhf_ray_serve_*"))
    assert done.returncode == 0, done.stderr
    assert without_waiting(done.stderr) == ["stderr of ours", "after"] and left == []
    for words in ("said by the core", "said by ray", "said by serve"):
        assert done.stdout.count(words) == 1, done.stdout
