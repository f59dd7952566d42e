"""What /proc says of processes, waiting for them, and work in a fork of this one, which has imported all that it needs."""

import os
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path


def alive(pid):
    """Zombies have ended."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(what, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.02)


def without_waiting(said):
    """Its lines but for those that a slow start of Ray adds."""
    return [line for line in said.splitlines() if not line.strip().startswith("waiting ")]


def server_of(worker):
    with open(f"/proc/{worker}/stat") as stat:
        return int(stat.read().rpartition(")")[2].split()[1])


def descendants(pid: int) -> set[int]:
    """Processes below pid."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found, queue = set(), [pid]
    while queue:
        for child in children.get(queue.pop(), []):
            found.add(child)
            queue.append(child)
    return found


class Fork:
    """A fork of this process that does the work, and then ends: with 1 where it raises. For work without models and Ray."""

    def __init__(self, work: Callable[[], object]):
        self.ended = False  # and waited for
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                work()
                status = 0
            except SystemExit as ends:
                status = int(ends.code or 0)
            except BaseException:  # the tests of the parent must not go on in it
                traceback.print_exc()
            finally:
                os._exit(status)

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self) -> int:
        """Its exit status; -9 where it was killed."""
        status = os.waitpid(self.pid, 0)[1]
        self.ended = True
        return os.waitstatus_to_exitcode(status)
