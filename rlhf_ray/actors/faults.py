"""Faults for tests: a process ends, stops, fails or is slow at a named point, the same each time. No clock decides.

The environment variable RLHF_RAY_FAULTS names a JSON file, which is read at each point; a test may write another one for each run:

    [{"role": "policy", "rank": 0, "method": "update", "call": 2, "when": "before", "kind": "kill"}]

role, rank: the actor; method: of its class in `actors.role_actors` or `trainer_actors`; call: which one of those, from 1, counted
over restarts in a folder beside the file; step: only of those while so many steps are finished, counted apart (None: of all); when:
before or after it has worked. kind:

    kill       SIGKILL
    stop       SIGSTOP: the process is there and never answers
    exception  RuntimeError
    slow       it sleeps for `seconds` (1)
    host       SIGKILL to all processes of the Ray node that it is on

victim: "reward-0", say: kill or stop that actor (or its host) at this point instead, which must be on the same host.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

VARIABLE = "RLHF_RAY_FAULTS"
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
Role = TypeVar("Role", bound=type)


def with_points(role: Role) -> Role:
    """A role's actor class, each of whose calls is a point where a fault may be."""
    for name in dir(role):
        # getattr: a class's methods are listed by name, and there is no other way from there to them.
        method = getattr(role, name)
        if not name.startswith("_") and callable(method) and not isinstance(method, type):
            setattr(role, name, _at_point(name, method))
    return role


def _at_point(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def at_point(self: Any, *args: Any, **kwargs: Any) -> Any:
        path = os.environ.get(VARIABLE)
        if path is None:
            return method(self, *args, **kwargs)
        faults = _faults_of(Path(path), self.name, name)
        _come(Path(path), faults, "before")
        result = method(self, *args, **kwargs)
        _come(Path(path), faults, "after")
        return result

    return at_point


def tell_process(actor: str) -> None:
    """Note which process this actor is, for faults that end it from elsewhere."""
    path = os.environ.get(VARIABLE)
    if path is not None:
        _beside(Path(path), "processes", actor).write_text(str(os.getpid()))


def tell_step(step: int) -> None:
    """Note how many steps of PPO are finished."""
    path = os.environ.get(VARIABLE)
    if path is not None:
        _beside(Path(path), "processes", "step").write_text(str(step))


def _faults_of(path: Path, actor: str, method: str) -> list[dict[str, Any]]:
    """Those of this call of the actor. Counts the call, if any fault is to come to the method."""
    role, _, rank = actor.rpartition("-")
    listed = json.loads(path.read_text()) if path.exists() else []
    mine = [each for each in listed if (each["role"], each["rank"], each["method"]) == (role, int(rank), method)]
    if not mine:
        return []
    told = _beside(path, "processes", "step")
    step = int(told.read_text() or 0) if told.exists() else None
    numbers = {None: _count(path, f"{actor}-{method}"), step: _count(path, f"{actor}-{method}-{step}")}
    return [each for each in mine if each["call"] == numbers.get(each.get("step"))]


def _count(path: Path, name: str) -> int:
    with open(_beside(path, "calls", name), "ab") as file:
        file.write(b".")
        file.flush()
        return file.tell()


def _come(path: Path, faults: list[dict[str, Any]], when: str) -> None:
    for fault in (each for each in faults if each["when"] == when):
        kind = fault["kind"]
        if kind == "exception":
            raise RuntimeError(f"a fault for tests: {fault}")
        if kind == "slow":
            time.sleep(fault.get("seconds", 1))
        else:
            victim = fault.get("victim")
            process = os.getpid() if victim is None else int(_beside(path, "processes", victim).read_text())
            if kind == "host":
                _end_host(process)
            else:
                os.kill(process, SIGNALS[kind])


def _end_host(process: int) -> None:
    """The raylet above the process, and all that it has started; this process last, if it is one of them."""
    parents: dict[int, int] = {}
    raylet = None
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    while process > 1 and raylet is None:
        process = parents[process]
        if Path(f"/proc/{process}/comm").read_text().strip() == "raylet":
            raylet = process
    assert raylet is not None, "an actor is below its node's raylet"
    started = [raylet]
    for each in started:
        started += [child for child, parent in parents.items() if parent == each]
    for each in sorted(started, key=lambda pid: pid == os.getpid()):
        with suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)


def _beside(path: Path, kind: str, name: str) -> Path:
    folder = path.with_name(f"{path.name}.{kind}")
    folder.mkdir(exist_ok=True)
    return folder / name
