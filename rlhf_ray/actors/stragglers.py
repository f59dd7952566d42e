"""A chunk that takes far longer than others of its kind is given to a second actor of its role. The first answer counts; both are
equal (contract 1 of the design).

Only where a stateless role has several actors, and one of them has nothing to do. Each chunk is given away once at most; how long
is too long is learned from the role's earlier calls. Ray hands an argument's ref to the actor that needs it as soon as a call is
sent, and takes no such call back (one that is cancelled leaves its actor waiting for it). So a call that needs a movable call's
result is sent when that is there (`send_due`): one hop over the controller, in runs with several actors of a role.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from statistics import median

from rlhf_ray.actors.calls import Call, Handle, Member
from rlhf_ray.runs.events import EventLog

SHORTEST_LIMIT_S = 10.0  # no call is late before
TIMES_AS_LONG = 4.0  # as the usual one
LEAST_CALLS, RECENT_CALLS = 3, 32  # from which the usual one is learned
#: hears (the late call, the actor that it is given to as well, how that was seen, phase)
GivenAway = Callable[[Call, Member, str, str], None]


def tells_of_copy(events: EventLog, progress: Callable[[dict], None], stage: str) -> GivenAway:
    """An event and a line."""

    def given_away(call: Call, helper: Member, seen: str, phase: str) -> None:
        what, done = f"{call.member.name} is late", f"{call.name} was given to {helper.name} too, the first answer counts"
        events.add(what, done, stage=stage, role=call.member.role, phase=phase, seen=seen, steps_lost=0)
        progress({"stage": stage, "say": f"{what}, {phase}: {seen}; {done}", "warns": True})

    return given_away


class Stragglers:
    """What is late in a stage's stateless roles, and who else is at it."""

    def __init__(
        self,
        groups: Sequence[Sequence[Member]],
        members: Callable[[], Iterable[Member]],
        answered: Callable[[Iterable[Call]], set[Call]],
        failure_of: Callable[[Call], Exception | None],
        given_away: GivenAway,
    ):
        """groups: the actors of each role whose calls may move. members: of all roles. answered: which of these calls have ended,
        in whichever way. failure_of: what made one that has ended fail, if it has."""
        self.groups, self.members, self.given_away = groups, members, given_away
        self.answered, self.failure_of = answered, failure_of
        self._seconds: dict[tuple[str, str], deque[float]] = {}  # role and method -> of the newest calls
        self._copies: dict[Call, Call] = {}

    def ended(self, call: Call, seconds: float) -> None:
        """seconds: that its actor computed."""
        self._seconds.setdefault((call.member.role, call.method), deque(maxlen=RECENT_CALLS)).append(seconds)

    def usual_s(self, call: Call) -> float | None:
        """None: too few calls of its kind have ended."""
        seconds = self._seconds.get((call.member.role, call.method), ())
        return median(seconds) if len(seconds) >= LEAST_CALLS else None

    # -- what waits for a movable call ------------------------------------------------------------------------------------

    def send_due(self) -> list[Call]:
        """Send what no longer waits for a movable call, in the order in which each actor was asked -> calls of which an answer lets
        more be sent, or is the first of two."""
        while True:
            unsent = [call for member in self.members() for call in member.calls if not call.sent]
            needed = {arg.call for call in unsent for arg in call.args if isinstance(arg, Handle)}
            moving = {call for call in needed if call.sent and not call.settled}
            there = self.answered(moving)
            sent, queued = False, set()
            for call in unsent:
                queue = call.member, call.concurrency_group
                open_ = [a.call for a in call.args if isinstance(a, Handle) and not (a.call.settled or a.call in there)]
                if open_ or queue in queued:
                    queued.add(queue)
                else:
                    call.send()
                    sent = True
            if not sent:
                return [*(moving - there), *self._copies.values()]

    # -- what is late -----------------------------------------------------------------------------------------------------

    def look(self, head: Call, seconds: float, phase: str) -> None:
        """head: what its actor has been at for so long. If that is late, it and what follows go to idle actors, one each."""
        seen = self._late(head, seconds) if head.movable else None
        if seen is None:
            return
        queue = [call for call in head.member.calls if call.movable and call.sent]
        there = self.answered(queue)
        for call in queue:
            if call in there or call.copied:
                continue
            others = [each for group in self.groups if head.member in group for each in group if each is not head.member]
            helper = next((each for each in others if self._idle(each) and _same_weights(each, call)), None)
            if helper is None:
                return
            self._give(call, helper)
            self.given_away(call, helper, seen, phase)

    def _late(self, head: Call, seconds: float) -> str | None:
        """How that is seen."""
        left = [each for each in head.member.unasked if each.copied]
        if left:
            return f"still at {left[0].name}"
        usual_s = self.usual_s(head)
        if usual_s is None or seconds <= max(SHORTEST_LIMIT_S, TIMES_AS_LONG * usual_s):
            return None
        return f"at work for {seconds:.0f} s, a usual call takes {usual_s:.1f} s"

    def _idle(self, member: Member) -> bool:
        return member.process is not None and not member.unasked and len(self.answered(member.calls)) == len(member.calls)

    def _give(self, call: Call, helper: Member) -> None:
        copy = Call(
            helper, call.method, call.args, call.name.replace(call.member.name, helper.name), returns=call.returns,
            receipt=call.count > call.returns, account=call.account, concurrency_group=call.concurrency_group,
        )  # fmt: skip
        copy.send()
        helper.unasked.append(copy)
        call.copied, self._copies[call] = True, copy

    def take_answers(self) -> None:
        """Calls whose second actor was the first to answer have that answer from now on."""
        for member in (each for group in self.groups for each in group if each.unasked):
            there = self.answered(member.unasked)
            member.unasked = [each for each in member.unasked if each not in there]
        there = self.answered([*self._copies, *self._copies.values()])
        for call, copy in list(self._copies.items()):
            if call not in call.member.calls or call in there:  # answered, or of a step that was given up
                del self._copies[call]
            elif copy in there:
                del self._copies[call]
                if self.failure_of(copy) is None:  # else its actor is made again by whoever asks it next
                    _answered_by(call, copy)


def _answered_by(call: Call, copy: Call) -> None:
    """From now on the call is its second actor's; the first may still be at it."""
    left = Call(call.member, call.method, (), call.name, receipt=call.count > call.returns)
    left.refs, left.sent, left.copied = call.refs[-1:], call.sent, True  # the receipt alone: what it returns is not kept
    call.member.unasked.append(left)
    call.member.calls.remove(call)
    call.member, call.refs, call.life = copy.member, copy.refs, copy.life
    call.sent += 1  # what was seen of the first one counts no more
    call.member.calls.append(call)


def _same_weights(helper: Member, call: Call) -> bool:
    """Whether the other actor has the weights that this call is to be computed with."""
    before = call.member.calls[: call.member.calls.index(call)]
    return _version(helper, helper.calls) == _version(call.member, before)


def _version(member: Member, calls: Sequence[Call]) -> object:
    """Of the weights that an actor has after these calls; None: it never took any."""
    taken = [*([] if member.weights is None else [member.weights]), *(call for call in calls if call.brings_weights)]
    return taken[-1].args[0] if taken else None
