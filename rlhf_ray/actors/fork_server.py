"""A process that has imported what workers import, and forks itself into each worker that Ray asks for (`actors.forking`).

    python -P -m rlhf_ray.actors.fork_server LISTENER [STAGE ...]

LISTENER: the number of a listening socket that it inherits. STAGE: whose workers it is for, a key of LIBRARIES. A client
(`actors.fork_client`) sends the worker's command, environment, folder and standard streams; back go the worker's process number
and, at its end, its exit status, a line each. The server ends with its standard input, which whoever started it holds open.
Nothing here may start a thread or touch a GPU: neither survives a fork.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress

from rlhf_ray.collector import collector_paused

LIBRARIES = {
    "supervised": ("rlhf_ray.supervised.sft", "rlhf_ray.supervised.reward"),
    "ppo": (
        "rlhf_ray.roles.generator", "rlhf_ray.roles.reward", "rlhf_ray.roles.rewards", "rlhf_ray.roles.reference",
        "rlhf_ray.roles.assembler", "rlhf_ray.roles.trainer", "rlhf_ray.roles.knobs", "rlhf_ray.engines.forward",
        "rlhf_ray.engines.deepspeed_engine", "rlhf_ray.models.critic", "rlhf_ray.models.load", "rlhf_ray.models.trained",
        "rlhf_ray.data.store",
    ),
    "serving": ("rlhf_ray.serving.loading", "rlhf_ray.serving.app"),
}  # fmt: skip
RAY = {
    "supervised": ("rlhf_ray.supervised.launch",),
    "ppo": ("rlhf_ray.actors.role_actors",),
    "serving": ("rlhf_ray.serving.deployment", "ray.serve._private.controller", "ray.serve._private.proxy"),
}
RAY_WORKER = (
    "ray.actor", "ray._private.node", "ray._private.parameter", "ray._private.runtime_env.setup_hook",
)  # fmt: skip
REQUEST_S = 5.0  # within which a client has sent all of its request
YOUNG_S = 10.0
CRASHES = 3  # of workers as young as that, one after the other: it is the fork that fails them
CRASHED = (70, -signal.SIGABRT, -signal.SIGSEGV)  # exit statuses; the first is ours, that of one that Ray kills is 1


class Request:
    """A worker that a client asks for."""

    def __init__(self, client: socket.socket):
        self.client = client
        self.streams: list[int] = []

    def read(self) -> None:
        """Raises OSError, ValueError or KeyError for a client that is gone or sends something else."""
        self.client.settimeout(REQUEST_S)
        head, self.streams, *_ = socket.recv_fds(self.client, 8, 3)
        size, body = int.from_bytes(head, "big"), bytearray()
        while len(body) < size and (part := self.client.recv(size - len(body))):
            body += part
        asked = json.loads(body)
        self.command, self.environment, self.folder = asked["command"], asked["environment"], asked["folder"]
        self.client.settimeout(None)

    def close_streams(self) -> None:
        for stream in self.streams:
            os.close(stream)


class Server:
    """The workers that are alive, by their process numbers, and the clients that stand for them."""

    def __init__(self, listener: socket.socket, stages: Sequence[str]):
        self.listener, self.stages = listener, stages
        self.clients: dict[int, socket.socket] = {}
        self.started: dict[int, float] = {}  # by time.monotonic
        self.crashes = 0
        self.ray_variables: dict[str, str] = {}
        self.selector = selectors.DefaultSelector()
        self.ended, self._end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)  # has something to read when a worker has ended
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._end, warn_on_full_buffer=False)
        for source in (sys.stdin, listener, self.ended):
            self.selector.register(source, selectors.EVENT_READ)

    def run(self) -> Request | None:
        """Serves until standard input ends: None. In each worker it returns what that is to be."""
        while True:
            for key, _ in self.selector.select():
                if key.fileobj is sys.stdin:
                    return None
                if key.fileobj is self.listener:
                    request = self._fork()
                    if request is not None:
                        return request
                elif key.fileobj == self.ended:
                    self._tell_of_ends()
                elif key.data in self.clients:  # its client is gone, without whom Ray has no hold on it
                    self.selector.unregister(key.fileobj)
                    os.kill(key.data, signal.SIGKILL)

    def _fork(self) -> Request | None:
        client, _ = self.listener.accept()
        request = Request(client)
        try:
            request.read()
            self._import_ray(request.environment)
        except (OSError, ValueError, KeyError) as error:  # the client then starts the worker itself
            print(f"a request that came to nothing: {error!r}", file=sys.stderr, flush=True)
            request.close_streams()
            client.close()
            return None
        worker = os.fork()
        if worker == 0:
            self._leave()
            return request
        request.close_streams()
        self.clients[worker], self.started[worker] = client, time.monotonic()
        self.selector.register(client, selectors.EVENT_READ, worker)
        _say(client, worker)
        return None

    def _import_ray(self, environment: dict[str, str]) -> None:
        """Ray reads its variables (which job and whose workers these are) when it is imported: so not before they are known.

        Raises ValueError for another Ray than that of the requests before.
        """
        wanted = {name: value for name, value in environment.items() if name.startswith("RAY_")}
        if not self.ray_variables:
            self.ray_variables = wanted
            os.environ.update(wanted)
            import_all((*RAY_WORKER, *(module for stage in self.stages for module in RAY[stage])))
        elif wanted != self.ray_variables:
            differing = sorted(name for name, _ in wanted.items() ^ self.ray_variables.items())
            raise ValueError(f"a worker with other values of {', '.join(differing)}")

    def _tell_of_ends(self) -> None:
        os.read(self.ended, 1 << 16)
        while self.clients:
            worker, status = os.waitpid(-1, os.WNOHANG)
            if worker == 0:
                return
            client = self.clients.pop(worker)
            if client in self.selector.get_map():
                self.selector.unregister(client)
            code, age = os.waitstatus_to_exitcode(status), time.monotonic() - self.started.pop(worker)
            _say(client, code % 256)
            client.close()
            self.crashes = self.crashes + 1 if code in CRASHED and age < YOUNG_S else 0
            if self.crashes == CRASHES and self.listener in self.selector.get_map():
                print(f"the last {CRASHES} workers crashed at their start: no more forks", file=sys.stderr, flush=True)
                self.selector.unregister(self.listener)
                self.listener.close()

    def _leave(self) -> None:
        """In a worker: nothing of the server's stays open."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self.selector.close()
        for client in self.clients.values():
            client.close()
        self.listener.close()
        os.close(self.ended)
        os.close(self._end)


def _say(client: socket.socket, number: int) -> None:
    with suppress(OSError):  # it is gone; `run` will see that
        client.sendall(b"%d\n" % number)


def become(request: Request) -> None:
    """Turn this process, just forked, into the worker, and work until its end."""
    os.setsid()  # Ray ends a worker with its process group
    request.client.close()
    for number, stream in enumerate(request.streams):
        os.dup2(stream, number)
    request.close_streams()
    os.environ.clear()
    os.environ.update(request.environment)
    os.chdir(request.folder)
    for library in {"numpy.random", "torch"} & sys.modules.keys():  # Python's own generator sees to that itself
        sys.modules[library].seed()
    if "torch" in sys.modules:
        _follow_threads(sys.modules["torch"])
    script, *_ = sys.argv = request.command
    sys.path.insert(0, os.path.dirname(script))
    try:
        runpy.run_path(script, run_name="__main__")
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(CRASHED[0])


def _follow_threads(torch) -> None:
    """Ray tells a worker how many threads to use by OMP_NUM_THREADS, which torch reads when it is loaded, and here it is."""
    import ray._private.utils as utils

    set_variable = utils.set_omp_num_threads_if_unset

    def set_threads() -> bool:
        was_unset, threads = set_variable(), os.environ.get("OMP_NUM_THREADS", "")
        if threads.isdigit():
            torch.set_num_threads(int(threads))
        return was_unset

    utils.set_omp_num_threads_if_unset = set_threads


def import_all(modules: Iterable[str]) -> None:
    with collector_paused():
        for module in modules:
            importlib.import_module(module)
    gc.freeze()  # the collector would write to every object, and so make a copy of its page in every worker


def main() -> None:
    listener, *stages = sys.argv[1:]
    with collector_paused():
        if {"supervised", "ppo"} & set(stages):
            importlib.import_module("rlhf_ray.engines.distributed").prepare_deepspeed("cpu")  # before TRL
    import_all(module for stage in stages for module in LIBRARIES[stage])
    # Python 3.12 warns of threads at a fork. Those of numpy's products mind.
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
    request = Server(socket.socket(fileno=int(listener)), stages).run()
    if request is not None:
        become(request)


if __name__ == "__main__":
    main()
