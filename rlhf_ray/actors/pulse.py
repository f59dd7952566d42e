"""What a process of the run is doing, as its host's kernel sees it. The process itself is not asked: it may be stopped, or hang.

So a busy machine is not taken for a process that hangs: a thread that waits for a core is runnable, one that hangs is not. Linux
only; elsewhere nothing is known of a process, and deadlines alone count.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

LOOK_S = 15.0  # in which another host has to answer
AT_WORK = "RD"  # runs or would like to; waits for a disk


@dataclass(frozen=True, slots=True)
class ActorProcess:
    """One of the cluster's."""

    node: str  # Ray's id of it
    pid: int
    started: int  # clock ticks after the host's start: another process may get its number


@dataclass(frozen=True, slots=True)
class Pulse:
    stopped: bool  # by a signal
    at_work: bool  # a thread of it, or of a process that it started, has something to do


def this_process() -> ActorProcess:
    return ActorProcess(node=ray.get_runtime_context().get_node_id(), pid=os.getpid(), started=started_at(os.getpid()))


def pulse(process: ActorProcess) -> Pulse | None:
    """None: the process is not there, or its host does not answer."""
    return _there(process, pulse_here)


def end(process: ActorProcess) -> None:
    """SIGKILL, which ends a stopped process too: Ray only asks a process to end, and that one doesn't hear it."""
    _there(process, end_here)


def pulse_here(process: ActorProcess) -> Pulse | None:
    """Of a process on this host."""
    states = _states(process.pid)
    if not states or started_at(process.pid) != process.started:
        return None
    return Pulse(stopped=all(each == "T" for each in states), at_work=_at_work(process.pid))


def end_here(process: ActorProcess) -> None:
    with suppress(ProcessLookupError):
        if started_at(process.pid) == process.started:
            os.kill(process.pid, signal.SIGKILL)


def started_at(pid: int) -> int:
    """-1 where there is no such process, and on systems without /proc."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return -1


def _at_work(pid: int) -> bool:
    return any(state in AT_WORK for state in _states(pid)) or any(map(_at_work, _children(pid)))


def _states(pid: int) -> list[str]:
    """Of each thread, as letters (`man 5 proc`). None of a process that has ended."""
    found: list[str] = []
    for stat in Path(f"/proc/{pid}/task").glob("*/stat"):
        with suppress(OSError):
            found.append(stat.read_text().rpartition(")")[2].split()[0])
    return [state for state in found if state not in "ZX"]


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            found += map(int, children.read_text().split())
    return found


def _there(process: ActorProcess, what: Callable[[ActorProcess], Pulse | None]) -> Pulse | None:
    """The answer of the process's host."""
    node = ray.get_runtime_context().get_node_id()
    if process.node == node:
        return what(process)
    place = NodeAffinitySchedulingStrategy(process.node, soft=False)
    asked = ray.remote(num_cpus=0, max_retries=0)(what).options(scheduling_strategy=place).remote(process)
    try:
        return ray.get(asked, timeout=LOOK_S)
    except RayError:  # no such host any more, or too late
        ray.cancel(asked, force=True)
        return None
