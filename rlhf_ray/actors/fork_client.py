"""What Ray starts in place of Python where there is a fork server: it has the server fork the worker, and stands for it.

    python -I -S fork_client.py SOCKET PYTHON SCRIPT [ARGUMENT ...]

PYTHON SCRIPT ARGUMENT ... is the worker's own command, which this process becomes where the server does not answer. Else it ends
when the worker does, with its exit status. Ray ends a worker that is late by the process that it started, which is this one: the
server then ends the worker. Standard library only, and little of it: nobody wants to wait for this.
"""

import contextlib
import json
import os
import socket
import sys
import time

START_S = 45.0  # Ray gives a worker 60 until it has answered
POLL_S = 0.5


def main(path: str, python: str, *command: str) -> int:
    try:
        server, worker = asked(path, command)
    except (OSError, ValueError) as error:
        print(f"the fork server does not answer ({error}); this worker imports everything itself", file=sys.stderr)
        sys.stderr.flush()
        os.execv(python, [python, *command])
    return exit_status(server, worker)


def asked(path: str, command: tuple[str, ...]) -> tuple[socket.socket, int]:
    """The connection to the server, and the process of the worker that it forked."""
    server = socket.socket(socket.AF_UNIX)
    server.settimeout(START_S)
    server.connect(path)
    request = json.dumps({"command": command, "environment": dict(os.environ), "folder": os.getcwd()}).encode()
    socket.send_fds(server, [len(request).to_bytes(8, "big")], [0, 1, 2])
    server.sendall(request)
    worker = int(line(server))
    server.settimeout(None)
    return server, worker


def exit_status(server: socket.socket, worker: int) -> int:
    try:
        return int(line(server))
    except (OSError, ValueError):  # the server ended, not the worker
        with contextlib.suppress(ProcessLookupError):
            while True:
                os.kill(worker, 0)
                time.sleep(POLL_S)
        return 1


def line(server: socket.socket) -> bytes:
    """Up to a line's end, or that of the connection."""
    read = b""
    while not read.endswith(b"\n"):
        more = server.recv(1)
        if not more:
            break
        read += more
    return read


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
