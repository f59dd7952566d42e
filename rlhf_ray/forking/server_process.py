"""Workers of a Ray on this machine as forks of one process, which imports torch, transformers and DeepSpeed for all of them.

Several workers are then there in a fraction of a second, and share the memory of those libraries. Where there is no such process
(another system than Linux, GPUs, which do not survive a fork, RLHF_RAY_FORK=off) or it has ended, workers start as usual; what they
compute is the same.
"""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

CLIENT = Path(__file__).with_name("fork_client.py")
GPU_DEVICES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg", "/dev/nvmap")
END_S = 5.0

log = logging.getLogger(__name__)


def forks_here(stages: Sequence[str]) -> bool:
    """Whether workers of these stages are to be forked on this machine."""
    # hasattr: Python was built without it where the system's headers are older than Linux 5.3.
    on = os.environ.get("RLHF_RAY_FORK", "on") != "off" and sys.platform == "linux" and hasattr(os, "pidfd_open")
    return bool(stages) and on and not any(map(os.path.exists, GPU_DEVICES))


@contextmanager
def fork_server(
    stages: Sequence[str], environment: Mapping[str, str], inherited: Mapping[str, str] = os.environ
) -> Iterator[str | None]:
    """A fork server for the body of the `with` -> the program that Ray is to start in place of Python, if any.

    stages: those whose workers there will be (`imports.LIBRARIES`). environment: variables that workers get; libraries read
    some of them when they are imported. inherited: variables that workers have from Ray.
    """
    if not forks_here(stages):
        yield None
        return
    folder = None
    try:
        folder = Path(tempfile.mkdtemp(prefix="rlhf_ray_"))  # nobody else may connect: mode 700
        path, errors = str(folder / "s"), folder / "errors.log"
        with socket.socket(socket.AF_UNIX) as listener, open(errors, "wb") as log_file:
            listener.bind(path)
            os.chmod(path, 0o600)
            listener.listen(socket.SOMAXCONN)
            server = subprocess.Popen(
                [sys.executable, "-P", "-m", "rlhf_ray.forking.fork_server", str(listener.fileno()), path, *stages],
                stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=log_file, pass_fds=[listener.fileno()],
                env={**inherited, **environment}, start_new_session=True,
            )  # fmt: skip
    except OSError as error:  # e.g. a full disk, or a path too long for a socket
        log.warning("workers will import everything themselves: %s", error)
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        yield None
        return
    try:
        yield shlex.join([sys.executable, "-I", "-S", str(CLIENT), path, sys.executable])
    finally:
        if server.poll() is not None:
            log.warning("the fork server ended early: %s", errors.read_text(errors="replace")[-1000:])
        assert server.stdin is not None  # a pipe
        server.stdin.close()  # its sign to end
        with suppress(subprocess.TimeoutExpired):
            server.wait(END_S)
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)  # branches are of its group, workers are not
        server.wait()
        shutil.rmtree(folder, ignore_errors=True)
