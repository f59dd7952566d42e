"""A server in a process of its own, as its users have it: `rlhf-ray serve`, or vLLM's."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from rlhf_ray.errors import RunFailed

NAME = "bench"
"""Of the model, in requests."""
_START_S, _END_S = 900.0, 60.0


class ServedProcess:
    """Answers at `url` from the start of a `with` to its end."""

    def __init__(self, command: Sequence[str], port: int, environment: Mapping[str, str] | None = None):
        self.command, self.port, self.url = list(command), port, f"http://127.0.0.1:{port}"
        self._environment = {**os.environ, **(environment or {})}
        self._log = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115 - it ends with the process's output
        self._process: subprocess.Popen | None = None
        self._before: Any = None  # what SIGTERM did

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def __enter__(self) -> ServedProcess:
        """RunFailed where it does not answer in time."""
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the server ends too
        self._process = subprocess.Popen(
            self.command, stdout=self._log, stderr=subprocess.STDOUT, env=self._environment, start_new_session=True
        )
        try:
            self._wait()
        except BaseException:  # fault boundary: the start; a `with` that has not begun ends nothing
            self.__exit__()
            raise
        return self

    def _wait(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + _START_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RunFailed(f"the server did not start: {' '.join(self.command)}\n{self._said()}")
            time.sleep(0.2)

    def __exit__(self, *exception: object) -> None:
        assert self._process is not None
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(_END_S)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
        self._log.close()
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=5, trust_env=False).status_code == 200
        except httpx.HTTPError:
            return False

    def _said(self) -> str:
        self._log.seek(0)
        return self._log.read()[-4000:]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def own_server(model: Path, *options: str) -> ServedProcess:
    """`rlhf-ray serve` of a model folder."""
    port = free_port()
    command = [sys.executable, "-m", "rlhf_ray", "serve", str(model), "--name", NAME, "--port", str(port), *options]
    return ServedProcess(command, port)


def vllm_server(python: Path, model: Path, *, positions: int, precision: str) -> ServedProcess:
    """vLLM's own OpenAI server, by an interpreter that has vLLM."""
    port = free_port()
    command = [
        str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--served-model-name", NAME,
        "--host", "127.0.0.1", "--port", str(port), "--max-model-len", str(positions), "--dtype", precision,
    ]  # fmt: skip
    return ServedProcess(command, port, {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"})


def replicas_of(pid: int) -> list[int]:
    """The processes that hold a server's models, oldest first."""
    parents, names = {}, {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            head, _, rest = (place / "stat").read_text().rpartition(")")
        except OSError:
            continue
        parents[int(place.name)], names[int(place.name)] = int(rest.split()[1]), head.partition("(")[2]
    found = []
    for one, name in names.items():
        above = one
        while above in parents and above != pid:
            above = parents[above]
        if above == pid and name.startswith("ray::ServeRepl"):
            found.append(one)
    return sorted(found)
