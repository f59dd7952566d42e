"""Faults for tests: a process ends, stops, fails or is slow at a named point, the same each time. No clock decides.

The environment variable RLHF_RAY_FAULTS names a JSON file, which is read at each point; a test may write another one for each run:

    [{"role": "policy", "rank": 0, "method": "update", "call": 2, "when": "before", "kind": "kill"}]

role, rank: the actor; method: of its class in `actors.role_actors` or `trainer_actors`; call: which one of those, from 1, counted
over restarts in a folder beside the file; step: only of those while so many steps are finished, counted apart (None: of all).

when: before or after the call has worked, or in the middle of its work: the dotted name, from the actor on, of what the work calls
or iterates over, such as "role.engine.step" (of a function of the package: its full name). The fault comes when that has been
called, or has yielded an item, once, or `times` times.

kind:

    kill       SIGKILL
    stop       SIGSTOP: the process is there and never answers
    exception  RuntimeError
    slow       it sleeps for `seconds` (1)
    host       SIGKILL to all processes of the Ray node that it is on
    link       the interface `interface` of the network that it is in goes down: for `seconds`, or for good where none are given
    sign       a file `name`.json, with the fault in it, appears in the folder "signs" beside this one: for whoever makes the fault
               outside of the run

victim: "reward-0", say: that actor (its host, its network) meets it at this point instead; it must be on the same machine.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from functools import partial, wraps
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

from rlhf_ray.runs.storage import write_atomically

VARIABLE = "RLHF_RAY_FAULTS"
HAPPENED = "happened"  # the file beside the calls' with as many bytes as faults that came
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
        with ExitStack() as put_in:
            for fault in (each for each in faults if each["when"] not in ("before", "after")):
                put_in.callback(_put_in_the_middle(self, fault, partial(_happen, Path(path), fault)))
            result = method(self, *args, **kwargs)
        _come(Path(path), faults, "after")
        return result

    return at_point


def _put_in_the_middle(actor: Any, fault: dict[str, Any], happen: Callable[[], None]) -> Callable[[], None]:
    """Let it happen after what the fault names has been used -> what takes it out again."""
    place, _, name = fault["when"].rpartition(".")
    owner = import_module(place) if place.startswith("rlhf_ray.") else attrgetter(place)(actor)
    own = vars(owner).get(name)  # None: it is its class's
    # getattr: the name is the fault's, and there is no other way from there to what it names.
    setattr(owner, name, _followed_by(getattr(owner, name), happen, fault.get("times", 1)))
    return partial(delattr, owner, name) if own is None else partial(setattr, owner, name, own)


def _followed_by(used: Callable[..., Any], happen: Callable[[], None], times: int) -> Callable[..., Any]:
    """The same function, or the same iterator, and `happen` after so many calls or items."""
    left = times

    def one_more() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            happen()

    def items(found: Iterator[Any]) -> Iterator[Any]:
        for item in found:
            yield item
            one_more()

    @wraps(used)
    def followed(*args: Any, **kwargs: Any) -> Any:
        found = used(*args, **kwargs)
        if isinstance(found, Iterator):
            return items(found)
        one_more()
        return found

    return followed


def happened(path: Path) -> int:
    """How many faults of the file came."""
    counted = _beside(path, "calls", HAPPENED)
    return counted.stat().st_size if counted.exists() else 0


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
        _happen(path, fault)


def _happen(path: Path, fault: dict[str, Any]) -> None:
    kind = fault["kind"]
    _count(path, HAPPENED)
    if kind == "exception":
        raise RuntimeError(f"a fault for tests: {fault}")
    if kind == "slow":
        time.sleep(fault.get("seconds", 1))
    elif kind == "sign":
        write_atomically(_beside(path, "signs", f"{fault['name']}.json"), json.dumps(fault))
    else:
        victim = fault.get("victim")
        process = os.getpid() if victim is None else int(_beside(path, "processes", victim).read_text())
        if kind == "host":
            _end_host(process)
        elif kind == "link":
            _take_down(process, fault["interface"], fault.get("seconds"))
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


def _take_down(process: int, interface: str, seconds: float | None) -> None:
    """In the network (namespace) that the process is in; and up again by a process that nobody waits for."""
    network = f"nsenter --net=/proc/{process}/ns/net"
    if seconds is not None:  # it enters the network before that can be gone
        back = f"sleep {seconds}; ip link set dev {interface} up"
        subprocess.Popen([*network.split(), "sh", "-c", back], start_new_session=True)
    subprocess.run(f"{network} ip link set dev {interface} down".split(), check=True, capture_output=True, timeout=60)


def _beside(path: Path, kind: str, name: str) -> Path:
    folder = path.with_name(f"{path.name}.{kind}")
    folder.mkdir(exist_ok=True)
    return folder / name
