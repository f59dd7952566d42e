"""What /proc says of processes, waiting for them, and work in a fork of this one, which has imported all that it needs."""

import os
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


def in_a_fork(work: Callable[[], None]) -> int:
    """The exit status of a fork of this process that does the work: 1 where it raises, -9 where it is killed. For work without
    threads, models and Ray."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        except SystemExit as ends:
            status = ends.code
        except BaseException:  # the parent's tests must not go on in it
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
