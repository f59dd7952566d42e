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
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from safetensors import SafetensorError

from rlhf_ray.actors.receipt import Receipt
from rlhf_ray.errors import RunFailed, UserError, machine_failed, whole_message

POLL_S = 1.0
START_REMEDY = "raise resources.start_timeout_s, or look in the run folder's logs/ for what holds it up"


class Deadline(RunFailed):
    """Something took longer than the recipe allows."""


class ActorDied(RunFailed):
    """A process of the run ended. The run stops with its cause; the same command goes on from the last checkpoint."""


@dataclass(frozen=True, slots=True)
class Tracked:
    name: str  # "reward actor 1 (step 17, chunk 3)"
    receipt: ray.ObjectRef | None  # None: the result itself is small and is looked at
    account: str  # what the receipt's seconds and bytes are added to


class Waiter:
    """Knows what each outstanding ref is. `on_wait(what, seconds)` hears of a wait once a second."""

    def __init__(self, deadline_s: float, remedy: str, on_wait: Callable[[str, float], None] = lambda what, s: None):
        self.deadline_s, self.remedy, self.on_wait = deadline_s, remedy, on_wait
        self.busy_s: dict[str, float] = {}  # account (a role, or its update) -> compute seconds since `take_totals`
        self.bytes: dict[str, int] = {}
        self._tracked: dict[ray.ObjectRef, Tracked] = {}
        self._beside: dict[ray.ObjectRef, list[ray.ObjectRef]] = {}

    def track(
        self, ref: ray.ObjectRef, name: str, receipt: ray.ObjectRef | None = None, account: str | None = None
    ) -> ray.ObjectRef:
        """name: begins with the role, which is its account if no other is given."""
        self._tracked[ref] = Tracked(name, receipt, account or name.split()[0])
        return ref

    def put_beside(self, refs: list[ray.ObjectRef], other: ray.ObjectRef) -> None:
        """Whoever waits for `other` waits for `refs` too; no caller gets `refs`."""
        self._beside[other] = refs

    def wait(
        self, refs: Sequence[ray.ObjectRef], what: str, deadline_s: float | None = None, remedy: str | None = None
    ) -> None:
        """Until all are there. Raises what a failed call raised, `Deadline` past the deadline.

        remedy: the advice in the message, where this wait has a deadline of its own.
        """
        deadline_s, remedy = deadline_s or self.deadline_s, remedy or self.remedy
        started = time.monotonic()
        waiting = {}
        for ref in [each for given in refs for each in (given, *self._beside.pop(given, ()))]:
            tracked = self._tracked.pop(ref, None)
            if tracked is not None:  # else it was waited for already
                waiting[tracked.receipt if tracked.receipt is not None else ref] = tracked
        pending = list(waiting)
        while pending:
            done, pending = ray.wait(pending, num_returns=len(pending), timeout=POLL_S, fetch_local=False)
            for ref in done:
                self._look_at(ref, waiting[ref], remedy)
            seconds = time.monotonic() - started
            if pending:
                name = waiting[pending[0]].name
                self.on_wait(name, seconds)
                if seconds > deadline_s:
                    raise Deadline(
                        f"waited {seconds:.0f} s for {name} during {what}, longer than {deadline_s:.0f} s; {remedy}"
                    )

    def get(
        self, refs: Sequence[ray.ObjectRef], what: str, deadline_s: float | None = None, remedy: str | None = None
    ) -> list[Any]:
        """`wait`, then the values: for small ones only, the controller holds no tensors."""
        self.wait(refs, what, deadline_s, remedy)
        return _fetch(list(refs), what, remedy or self.remedy)

    def take_totals(self) -> dict[str, float]:
        """busy/<account>_s and bytes/<account> since the last call."""
        totals = {f"busy/{role}_s": seconds for role, seconds in self.busy_s.items()}
        totals |= {f"bytes/{role}": float(count) for role, count in self.bytes.items()}
        self.busy_s, self.bytes = {}, {}
        return totals

    def _look_at(self, ref: ray.ObjectRef, tracked: Tracked, remedy: str) -> None:
        value = _fetch(ref, tracked.name, remedy)
        if isinstance(value, Receipt):
            self.busy_s[tracked.account] = self.busy_s.get(tracked.account, 0.0) + value.seconds
            self.bytes[tracked.account] = self.bytes.get(tracked.account, 0) + value.bytes


def _fetch(refs: ray.ObjectRef | list[ray.ObjectRef], name: str, remedy: str) -> Any:
    """The value of what is finished. A failure of user or machine is raised as one sentence, a bug with its traceback."""
    try:
        return ray.get(refs, timeout=60)
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, (UserError, RunFailed)):
            raise cause from None
        if isinstance(cause, (OSError, SafetensorError)):  # safetensors writes files, but raises no OSError
            raise machine_failed(name, cause) from error
        # An argument of the call never came. A plain RayError only stands for a cause that can't be pickled.
        if isinstance(cause, RayError) and type(cause) is not RayError:
            raise _died(f"a process that {name} waited for", cause) from error
        raise
    except GetTimeoutError as error:
        raise Deadline(f"{name} finished, but its result didn't arrive within 60 s; {remedy}") from error
    except RayError as error:  # a dead actor; killed for memory; a lost object or node
        raise _died(name, error) from error


def _died(name: str, error: RayError) -> Exception:
    """The error for a dead process. A UserError of an actor's constructor stays one; Ray gives it as text only."""
    _, told, sentence = str(error).rpartition("rlhf_ray.errors.UserError: ")
    if told:
        # All of its lines, one per problem; a further traceback follows a blank one.
        return UserError(sentence.strip().partition("\n\n")[0])
    return ActorDied(
        f"{name} died ({whole_message(error)}); see the run folder's logs/, "
        "then run the same command again to go on from the last checkpoint"
    )
