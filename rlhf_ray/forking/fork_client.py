"""What Ray starts in place of Python where there is a fork server: it has the server fork the worker, and stands for it.

    python -I -S fork_client.py SOCKET PYTHON SCRIPT [ARGUMENT ...]

PYTHON SCRIPT ARGUMENT ... is the worker's own command, which this process becomes where the server does not answer. Else it ends
when the worker does, with its exit status. Ray ends a worker that is late by the process that it started, which is this one: the
server then ends the worker. Standard library only, and little of it, so that it starts fast.
"""

import contextlib
import json
import os
import select
import socket
import sys

WAIT_S = 20.0  # for each of two answers; Ray gives a worker 60 until it has answered
SURROUNDINGS = ("ns/net", "ns/mnt", "ns/pid", "ns/ipc", "ns/user")


def main(path: str, python: str, *command: str) -> int:
    try:
        branch, worker, end = asked(path, command)
    except Exception as error:  # fault boundary: the fork; without it the worker starts as any other
        print(f"no fork: {error}; this worker imports everything itself", file=sys.stderr)
        sys.stderr.flush()
        os.execv(python, [python, *command])
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("0")  # Ray marked this process as the one to end where memory is short; the worker took that over
    try:
        return int(line(branch))
    except (OSError, ValueError):  # the branch ended, not the worker
        select.select([end], [], [])
        return 1


def asked(path: str, command: tuple[str, ...]) -> tuple[socket.socket, int, int]:
    """The connection to the server's branch, the worker that it forked, and a descriptor that becomes readable at its end.

    Raises OSError or ValueError where there is no such worker.
    """
    with connected(path) as server:
        server.sendall(json.dumps({"variables": dict(os.environ), "surroundings": surroundings()}).encode() + b"\n")
        answer = line(server).decode().strip()
    if not answer.startswith("/"):
        raise ValueError(answer)
    branch = connected(answer)
    request = {"command": command, "environment": dict(os.environ), "folder": os.getcwd(),
               "cores": sorted(os.sched_getaffinity(0))}  # fmt: skip
    body = json.dumps(request).encode()
    socket.send_fds(branch, [len(body).to_bytes(8, "big")], [0, 1, 2])
    branch.sendall(body)
    worker = int(line(branch))
    branch.settimeout(None)
    return branch, worker, os.pidfd_open(worker)


def surroundings(process: str = "self") -> list[str]:
    """What a fork takes from the server and not from this process: namespaces and control group."""
    with open(f"/proc/{process}/cgroup") as file:
        return [*(os.readlink(f"/proc/{process}/{name}") for name in SURROUNDINGS), file.read()]


def connected(path: str) -> socket.socket:
    server = socket.socket(socket.AF_UNIX)
    server.settimeout(WAIT_S)
    server.connect(path)
    return server


def line(server: socket.socket) -> bytes:
    """Raises ValueError where the connection ends before the line does."""
    read = b""
    while not read.endswith(b"\n"):
        more = server.recv(1)
        if not more:
            raise ValueError("the server ended")
        read += more
    return read


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
