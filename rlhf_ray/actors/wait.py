"""Every wait has a deadline and a name, and no call's failure is dropped.

A call that returns something large returns a small receipt beside it. The controller waits for and looks at receipts
only, so it learns of a failure without ever fetching what it merely passes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from rlhf_ray.errors import RunFailed, UserError

POLL_S = 1.0


class Deadline(RunFailed):
    """Something took longer than the recipe allows."""


class ActorDied(RunFailed):
    """A process of the run ended. The run stops with its cause; the same command goes on from the last checkpoint."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a call says about itself."""

    seconds: float  # of computing, without waiting for arguments
    bytes: int  # of what it returned


@dataclass(frozen=True, slots=True)
class Tracked:
    name: str  # "reward actor 1 (step 17, chunk 3)"
    receipt: ray.ObjectRef | None  # None: the result itself is small and is looked at


class Waiter:
    """Knows what each outstanding ref is. `on_wait(what, seconds)` hears of a wait once a second."""

    def __init__(self, deadline_s: float, remedy: str, on_wait: Callable[[str, float], None] = lambda what, s: None):
        self.deadline_s, self.remedy, self.on_wait = deadline_s, remedy, on_wait
        self.busy_s: dict[str, float] = {}  # role -> compute seconds since `take_totals`
        self.bytes: dict[str, int] = {}
        self._tracked: dict[ray.ObjectRef, Tracked] = {}

    def track(self, ref: ray.ObjectRef, name: str, receipt: ray.ObjectRef | None = None) -> ray.ObjectRef:
        self._tracked[ref] = Tracked(name, receipt)
        return ref

    def forget(self, ref: ray.ObjectRef) -> None:
        """Nobody will wait for this one."""
        self._tracked.pop(ref, None)

    def wait(self, refs: Sequence[ray.ObjectRef], what: str, deadline_s: float | None = None) -> None:
        """Until all are there. Raises what a failed call raised, `Deadline` past the deadline."""
        deadline_s = deadline_s or self.deadline_s
        started = time.monotonic()
        waiting = {}
        for ref in refs:
            tracked = self._tracked.pop(ref, None)
            if tracked is not None:  # else it was waited for already
                waiting[tracked.receipt if tracked.receipt is not None else ref] = tracked
        pending = list(waiting)
        while pending:
            done, pending = ray.wait(pending, num_returns=len(pending), timeout=POLL_S, fetch_local=False)
            for ref in done:
                self._look_at(ref, waiting[ref])
            seconds = time.monotonic() - started
            if pending:
                name = waiting[pending[0]].name
                self.on_wait(name, seconds)
                if seconds > deadline_s:
                    raise Deadline(
                        f"waited {seconds:.0f} s for {name} during {what}, longer than {deadline_s:.0f} s; {self.remedy}"
                    )

    def get(self, refs: Sequence[ray.ObjectRef], what: str, deadline_s: float | None = None) -> list[Any]:
        """`wait`, then the values: for small ones only, the controller holds no tensors."""
        self.wait(refs, what, deadline_s)
        try:
            return ray.get(list(refs), timeout=60)
        except GetTimeoutError as error:
            raise Deadline(f"{what} finished, but its result didn't arrive within 60 s; {self.remedy}") from error

    def take_totals(self) -> dict[str, float]:
        """busy/<role>_s and bytes/<role> since the last call."""
        totals = {f"busy/{role}_s": seconds for role, seconds in self.busy_s.items()}
        totals |= {f"bytes/{role}": float(count) for role, count in self.bytes.items()}
        self.busy_s, self.bytes = {}, {}
        return totals

    def _look_at(self, ref: ray.ObjectRef, tracked: Tracked) -> None:
        try:
            value = ray.get(ref, timeout=60)
        except RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise error.cause from None
            if isinstance(error.cause, RayActorError):  # an argument of the call never came
                raise _died(f"a process that {tracked.name} waited for", error.cause) from error
            raise
        except RayActorError as error:
            raise _died(tracked.name, error) from error
        if isinstance(value, Receipt):
            role = tracked.name.split()[0]
            self.busy_s[role] = self.busy_s.get(role, 0.0) + value.seconds
            self.bytes[role] = self.bytes.get(role, 0) + value.bytes


def _died(name: str, error: RayActorError) -> Exception:
    """What to tell of a dead actor; a constructor's UserError is the user's, and stands in the text only."""
    _, told, sentence = str(error).rpartition("rlhf_ray.errors.UserError: ")
    if told:
        return UserError(sentence.strip().splitlines()[0])
    return ActorDied(
        f"{name} died ({str(error).splitlines()[0]}); see the run folder's logs/, "
        "then run the same command again to go on from the last checkpoint"
    )
