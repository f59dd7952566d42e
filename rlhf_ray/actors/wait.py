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

from rlhf_ray.actors.calls import Call, Handle, Member
from rlhf_ray.actors.hung import AwakeClock, Deadline, Hung, HungWatch
from rlhf_ray.actors.receipt import CallReceipt
from rlhf_ray.errors import RunFailed, UserError, machine_failed, whole_message

POLL_S = 1.0
READ_S = 60.0  # in which a result comes from another host
START_REMEDY = "raise resources.start_timeout_s, or look in the run folder's logs/ for what holds it up"


class ActorDied(RunFailed):
    """A process of the run ended. Where `actors.recovery` can't help, the run stops with this cause."""


class ArgumentLost(ActorDied):
    """The process that made an argument of a call ended, so the call was never begun."""


@dataclass(frozen=True, slots=True)
class Tracked:
    """A ref that is no call of the loop: it can't be sent again."""

    name: str  # "reward actor 1 (start)"
    receipt: ray.ObjectRef  # what is looked at
    account: str  # what the receipt's seconds and bytes are added to


Awaited = Handle | ray.ObjectRef
#: (call, what failed, what was waited for): afterwards the call is under way again. Raises what can't be mended.
Mend = Callable[[Call, RunFailed | RayTaskError, str], None]


class Waiter:
    """Knows what each outstanding ref is. `on_wait(name, seconds, what)` hears of a wait at its beginning and once a second:
    the call that is waited for, for how long, and during what."""

    def __init__(
        self, deadline_s: float, remedy: str, on_wait: Callable[[str, float, str], None] = lambda name, s, what: None
    ):
        self.deadline_s, self.remedy, self.on_wait = deadline_s, remedy, on_wait
        self.mend: Mend | None = None  # `actors.recovery`; None: what fails is raised
        self.busy_s: dict[str, float] = {}  # account (a role, or its update) -> compute seconds since `take_totals`
        self.bytes: dict[str, int] = {}
        self.clock, self.watch = AwakeClock(time.monotonic), HungWatch(deadline_s, self.there)
        self._tracked: dict[ray.ObjectRef, Tracked] = {}

    def track(
        self, ref: ray.ObjectRef, name: str, receipt: ray.ObjectRef | None = None, account: str | None = None
    ) -> ray.ObjectRef:
        """name: begins with the role, which is its account if no other is given. receipt: None: the result itself is small
        and is looked at."""
        self._tracked[ref] = Tracked(name, ref if receipt is None else receipt, account or name.split()[0])
        return ref

    def wait(
        self, handles: Sequence[Awaited], what: str, deadline_s: float | None = None, remedy: str | None = None
    ) -> None:
        """Until all are there. Raises what a failed call raised, `Deadline` past the deadline, unless `mend` sees to it.

        deadline_s: of each actor, from the last call that it has answered; None: that of `actors.hung`. remedy: the advice in the
        message, where this wait has a deadline of its own.
        """
        remedy = remedy or self.remedy
        waiting = self._waiting(handles)
        started = since = self.clock.tick()
        heard: dict[Member, float] = {}  # when an actor last answered
        pending = list(waiting)
        if pending:
            self.on_wait(waiting[pending[0]].name, 0.0, what)
        while pending:
            done, pending = ray.wait(pending, num_returns=len(pending), timeout=POLL_S, fetch_local=False)
            now = self.clock.tick()
            for ref in done:
                each = waiting.pop(ref)
                again = self._look_at(ref, each, what, remedy)
                if again is not None:
                    waiting[again] = each
                    pending.append(again)
                if isinstance(each, Call):
                    heard[each.member] = now
            if pending:
                self.on_wait(waiting[pending[0]].name, now - started, what)
            for each in _first_of_each_actor([waiting[ref] for ref in pending]):
                if isinstance(each, Call) and deadline_s is None:
                    late = self.watch.hung(each, now, what, remedy)
                else:
                    late = self._late(each, now - (heard.get(each.member, since) if isinstance(each, Call) else since),
                                      deadline_s or self.deadline_s, what, remedy)  # fmt: skip
                if late is not None:
                    self._mend(each, late, what)
                    since, heard = self.clock.tick(), {}

    def get(
        self, handles: Sequence[Awaited], what: str, deadline_s: float | None = None, remedy: str | None = None
    ) -> list[Any]:
        """`wait`, then the values: for small ones only, the controller holds no tensors."""
        self.wait(handles, what, deadline_s, remedy)
        refs = [each.ref if isinstance(each, Handle) else each for each in handles]
        return _fetch(refs, what, remedy or self.remedy)

    def there(self, call: Call) -> bool:
        """Whether the call has ended, in whichever way."""
        return bool(ray.wait([call.receipt], timeout=0, fetch_local=False)[0])

    def failure_of(self, call: Call) -> RunFailed | RayTaskError | None:
        """What made the call fail, if it has; None: it has not, or is under way."""
        try:
            _fetch([call.receipt] if self.there(call) else [], call.name, self.remedy)
        except (RunFailed, RayTaskError) as failure:
            return failure
        return None

    def readable(self, handle: Handle) -> bool:
        """Whether a result is there. This may bring it to this host."""
        try:
            ray.get(handle.ref, timeout=READ_S)
        except RayTaskError:  # it is: an error
            return True
        except RayError:
            return False
        return True

    def take_totals(self) -> dict[str, float]:
        """busy/<account>_s and bytes/<account> since the last call."""
        totals = {f"busy/{role}_s": seconds for role, seconds in self.busy_s.items()}
        totals |= {f"bytes/{role}": float(count) for role, count in self.bytes.items()}
        self.busy_s, self.bytes = {}, {}
        return totals

    def _waiting(self, handles: Sequence[Awaited]) -> dict[ray.ObjectRef, Tracked | Call]:
        """What to look at -> what it is. What was waited for already is left out."""
        waiting: dict[ray.ObjectRef, Tracked | Call] = {}
        for handle in handles:
            if not isinstance(handle, Handle):
                tracked = self._tracked.pop(handle, None)
                waiting |= {} if tracked is None else {tracked.receipt: tracked}
                continue
            for call in (handle.call, *(other.call for other in handle.call.beside)):
                waiting |= {} if call.finished else {call.receipt: call}
        return waiting

    def _look_at(self, ref: ray.ObjectRef, each: Tracked | Call, what: str, remedy: str) -> ray.ObjectRef | None:
        """Take in a finished ref. Returns another one where the call was sent again."""
        if isinstance(each, Call) and each.receipt != ref:  # with others of its actor
            return each.receipt
        try:
            value = _fetch(ref, each.name, remedy)
        except (RunFailed, RayTaskError) as failure:
            self._mend(each, failure, what)
            assert isinstance(each, Call) and each.receipt != ref, f"{each.name} is mended, so it was sent again"
            return each.receipt
        if isinstance(value, CallReceipt):
            self._account(each, value)
        if isinstance(each, Call):
            self.watch.ended(each, value.seconds if isinstance(value, CallReceipt) else 0.0, self.clock.now)
            each.finish()
        return None

    def _account(self, each: Tracked | Call, receipt: CallReceipt) -> None:
        self.busy_s[each.account] = self.busy_s.get(each.account, 0.0) + receipt.seconds
        self.bytes[each.account] = self.bytes.get(each.account, 0) + receipt.bytes

    def _late(self, each: Tracked | Call, seconds: float, limit_s: float, what: str, remedy: str) -> Deadline | None:
        if seconds <= limit_s:
            return None
        words = f"waited {seconds:.0f} s for {each.name} during {what}, longer than {limit_s:.0f} s; {remedy}"
        return Hung(words, each.member) if isinstance(each, Call) else Deadline(words)

    def _mend(self, each: Tracked | Call, failure: RunFailed | RayTaskError, what: str) -> None:
        if self.mend is None or not isinstance(each, Call):
            raise failure
        self.mend(each, failure, what)


def _first_of_each_actor(pending: list[Tracked | Call]) -> list[Tracked | Call]:
    first: dict[Member | Tracked, Tracked | Call] = {}
    for each in pending:
        first.setdefault(each.member if isinstance(each, Call) else each, each)
    return list(first.values())


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
            raise _died(f"a process that {name} waited for", cause, ArgumentLost) from error
        raise
    except GetTimeoutError as error:
        raise Deadline(f"{name} finished, but its result didn't arrive within 60 s; {remedy}") from error
    except RayError as error:  # a dead actor; killed for memory; a lost object or node
        raise _died(name, error) from error


def _died(name: str, error: RayError, kind: type[ActorDied] = ActorDied) -> Exception:
    """The error for a dead process. A UserError of an actor's constructor stays one; Ray gives it as text only."""
    _, told, sentence = str(error).rpartition("rlhf_ray.errors.UserError: ")
    if told:
        # All of its lines, one per problem; a further traceback follows a blank one.
        return UserError(sentence.strip().partition("\n\n")[0])
    return kind(
        f"{name} died ({_cause(error)}); see the run folder's logs/, "
        "then run the same command again to go on from the last checkpoint"
    )


def _cause(error: RayError) -> str:
    """What Ray says of a dead process, without the ids before it and the advice behind it."""
    words = whole_message(error).rpartition("Worker exit detail: ")[2]
    return words.partition(" Some common causes include")[0].removesuffix(".")
