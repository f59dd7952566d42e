"""Every wait has a deadline and a name, and no call's failure is dropped.

A call that returns something large returns a small receipt beside it. The controller waits for and looks at receipts
only, so it learns of a failure without ever fetching what it merely passes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from safetensors import SafetensorError

from rlhf_ray.actors.calls import Call, Handle, Member
from rlhf_ray.actors.hung import AwakeClock, Deadline, Hung, HungWatch
from rlhf_ray.actors.low_memory import REMEDY, ended_by_guard
from rlhf_ray.actors.receipt import CallReceipt
from rlhf_ray.actors.stragglers import Stragglers
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
        self.stragglers: Stragglers | None = None  # None: no call is given to a second actor
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
        if waiting:
            self.on_wait(next(iter(waiting)).name, 0.0, what)
        while waiting:
            ended = self._wait_a_while(waiting)
            now = self.clock.tick()
            for ref, each in ended:
                if self._is_answered(ref, each, what, remedy):
                    del waiting[each]
                if isinstance(each, Call):
                    heard[each.member] = now
            if waiting:
                self.on_wait(next(iter(waiting)).name, now - started, what)
            for each in _first_of_each_actor(waiting):
                if isinstance(each, Call) and deadline_s is None:
                    late = self.watch.hung(each, now, what, remedy)
                    if late is None and self.stragglers is not None and self.stragglers.groups:
                        self.stragglers.look(*self.watch.busy_with(each, now), what)
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
        return call in self.answered([call])

    def answered(self, calls: Iterable[Call]) -> set[Call]:
        """Those of them that have ended, in whichever way."""
        sent = {call.receipt: call for call in calls if call.sent}
        there = ray.wait([*sent], num_returns=len(sent), timeout=0, fetch_local=False)[0] if sent else []
        return {sent[ref] for ref in there}

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

    def _waiting(self, handles: Sequence[Awaited]) -> dict[Tracked | Call, None]:
        """What they are, once each and in order. What was waited for already is left out."""
        waiting: dict[Tracked | Call, None] = {}
        for handle in handles:
            if not isinstance(handle, Handle):
                tracked = self._tracked.pop(handle, None)
                waiting |= {} if tracked is None else {tracked: None}
                continue
            for call in (handle.call, *(other.call for other in handle.call.beside)):
                waiting |= {} if call.finished else {call: None}
        return waiting

    def _wait_a_while(self, waiting: Iterable[Tracked | Call]) -> list[tuple[ray.ObjectRef, Tracked | Call]]:
        """Until all have ended, or something that others wait for -> (what to look at, what it is) of those that have."""
        also: list[Call] = []
        if self.stragglers is not None:
            self.stragglers.take_answers()
            also = self.stragglers.send_due()
        pending = {each.receipt: each for each in waiting if isinstance(each, Tracked) or each.sent}
        refs = [*(pending.keys() | {call.receipt for call in also})]
        done, _ = ray.wait(refs, num_returns=1 if also else len(refs), timeout=POLL_S, fetch_local=False)
        if also:
            done, _ = ray.wait(refs, num_returns=len(refs), timeout=0, fetch_local=False)
        return [(ref, pending[ref]) for ref in done if ref in pending]

    def _is_answered(self, ref: ray.ObjectRef, each: Tracked | Call, what: str, remedy: str) -> bool:
        """Take in a finished ref. False where the call was sent again, now or with others of its actor."""
        if each.receipt != ref:
            return False
        try:
            value = _fetch(ref, each.name, remedy)
        except (RunFailed, RayTaskError) as failure:
            self._mend(each, failure, what)
            assert isinstance(each, Call) and each.receipt != ref, f"{each.name} is mended, so it was sent again"
            return False
        seconds = 0.0
        if isinstance(value, CallReceipt):
            self._account(each, value)
            seconds = value.seconds
        if isinstance(each, Call):
            self.watch.ended(each, seconds, self.clock.now)
            if self.stragglers is not None and each.movable:
                self.stragglers.ended(each, seconds)
            each.finish()
        return True

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


def _first_of_each_actor(pending: Iterable[Tracked | Call]) -> list[Tracked | Call]:
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
    guard = ended_by_guard(error)
    cause, remedy = (_cause(error), "see the run folder's logs/") if guard is None else (guard, REMEDY)
    return kind(f"{name} died ({cause}); {remedy}, then run the same command again to go on from the last checkpoint")


def _cause(error: RayError) -> str:
    """What Ray says of a dead process, without the ids before it and the advice behind it."""
    words = whole_message(error).rpartition("Worker exit detail: ")[2]
    return words.partition(" Some common causes include")[0].removesuffix(".")
