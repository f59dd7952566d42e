"""A fork of the fork server (`forking.fork_server`) that imports Ray, and forks itself into workers.

A client sends the worker's command, environment, folder, cores and standard streams; it gets back the worker's process
number, which the worker itself sends, and at its end its exit status, one line each.
"""

from __future__ import annotations

import json
import os
import runpy
import selectors
import signal
import socket
import struct
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress

from rlhf_ray.forking.imports import REQUEST_S, import_actors
from rlhf_ray.forking.ray_internals import follow_threads, is_known_to_ray, no_ids_drawn

YOUNG_S = 10.0
FAILURES = 3  # workers in a row that end at their start: then the fork is at fault
CRASHED = (70, -signal.SIGABRT, -signal.SIGSEGV)  # exit statuses; the first is ours, that of one that Ray ends is 1


def main(listener: socket.socket, variables: dict[str, str], stages: Sequence[str]) -> None:
    os.environ.update(variables)
    with no_ids_drawn():
        import_actors(stages)
    request = Branch(listener).run()
    if request is None:
        sys.stderr.flush()
        os._exit(0)
    become(request)


class ForkRequest:
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
        self.command, self.environment = asked["command"], asked["environment"]
        self.folder, self.cores = asked["folder"], asked["cores"]
        self.client.settimeout(None)
        with suppress(BlockingIOError):
            self.client.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)  # it has no more to say
            raise ValueError("its client has given up")

    def close_streams(self) -> None:
        for stream in self.streams:
            os.close(stream)


class Branch:
    """The workers that are alive, by their process numbers, and the clients that stand for them."""

    def __init__(self, listener: socket.socket):
        self.listener: socket.socket | None = listener
        self.clients: dict[int, socket.socket] = {}
        self.started: dict[int, float] = {}  # by time.monotonic
        self.failures = 0
        self.selector = selectors.DefaultSelector()
        self.ended, self._end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)  # has something to read when a worker has ended
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._end, warn_on_full_buffer=False)
        for source in (sys.stdin, listener, self.ended):
            self.selector.register(source, selectors.EVENT_READ)

    def run(self) -> ForkRequest | None:
        """Serve until standard input ends, then return None. In each worker it returns what the worker is to become."""
        while True:
            for key, _ in self.selector.select():
                if key.fileobj is sys.stdin:
                    return None
                if key.fileobj == self.ended:
                    self._tell_of_ends()
                elif key.data in self.clients:
                    self._end_worker(key.data)
                elif self.listener is not None and key.fileobj is self.listener:
                    request = self._fork(self.listener)
                    if request is not None:
                        return request

    def _fork(self, listener: socket.socket) -> ForkRequest | None:
        request = None
        try:
            client, _ = listener.accept()
            request = ForkRequest(client)
            request.read()
            worker = os.fork()
        except (OSError, ValueError, KeyError) as error:  # the client, if it is there, then starts the worker itself
            print(f"a request that came to nothing: {error!r}", file=sys.stderr, flush=True)
            if request is not None:
                request.close_streams()
                request.client.close()
            return None
        if worker == 0:
            self._leave()
            return request
        request.close_streams()
        self.clients[worker], self.started[worker] = client, time.monotonic()
        self.selector.register(client, selectors.EVENT_READ, worker)
        return None

    def _end_worker(self, worker: int) -> None:
        """Its client is gone, through which alone Ray controls it."""
        self.selector.unregister(self.clients[worker])
        if not is_known_to_ray(worker):
            self._count_failure()
        os.kill(worker, signal.SIGKILL)

    def _tell_of_ends(self) -> None:
        os.read(self.ended, 1 << 16)
        while self.clients:
            worker, status = os.waitpid(-1, os.WNOHANG)
            if worker == 0:
                return
            client = self.clients.pop(worker, None)
            if client is None:  # some library's child
                continue
            if client in self.selector.get_map():
                self.selector.unregister(client)
            code, age = os.waitstatus_to_exitcode(status), time.monotonic() - self.started.pop(worker)
            with suppress(OSError):
                client.sendall(b"%d\n" % (code % 256))
            client.close()
            if code in CRASHED and age < YOUNG_S:
                self._count_failure()
            elif code != -signal.SIGKILL:
                self.failures = 0

    def _count_failure(self) -> None:
        self.failures += 1
        if self.failures >= FAILURES and self.listener is not None:
            print(f"the last {FAILURES} workers failed at their start: no more forks", file=sys.stderr, flush=True)
            self.selector.unregister(self.listener)
            self.listener.close()
            self.listener = None

    def _leave(self) -> None:
        """In a worker: nothing of the branch's stays open."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self.selector.close()
        for client in self.clients.values():
            client.close()
        assert self.listener is not None  # it has just been forked through it
        self.listener.close()
        os.close(self.ended)
        os.close(self._end)


def become(request: ForkRequest) -> None:
    """Turn this process, just forked, into the worker, and work until its end."""
    os.setsid()  # Ray ends a worker with its process group
    _take_oom_score(request.client)
    request.client.sendall(b"%d\n" % os.getpid())
    request.client.close()
    for number, stream in enumerate(request.streams):
        os.dup2(stream, number)
    request.close_streams()
    os.environ.clear()
    os.environ.update(request.environment)
    os.chdir(request.folder)
    os.sched_setaffinity(0, request.cores)
    _seed()
    if "torch" in sys.modules:
        follow_threads(sys.modules["torch"])
    script, *_ = sys.argv = request.command
    sys.path.insert(0, os.path.dirname(script))
    try:
        runpy.run_path(script, run_name="__main__")
    except Exception:  # fault boundary: the worker; its end must not be the branch's
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(CRASHED[0])


def _take_oom_score(client: socket.socket) -> None:
    """Where memory is short, the kernel is to end workers first: Ray marks only the process that it started."""
    number, *_ = struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    with suppress(OSError), open(f"/proc/{number}/oom_score_adj") as its, open("/proc/self/oom_score_adj", "w") as own:
        own.write(its.read())


def _seed() -> None:
    """Without a seed each worker draws numbers of its own. Python's generator sees to that itself."""
    for library in {"numpy.random", "torch"} & sys.modules.keys():
        sys.modules[library].seed()
    if "datasets.fingerprint" in sys.modules:
        sys.modules["datasets.fingerprint"].fingerprint_rng.seed()
