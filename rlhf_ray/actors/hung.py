"""Which call keeps a wait, and whether its actor is hung. Hung is dead: `actors.recovery` then ends the actor and makes it again.

Three things tell:

- The process is stopped (SIGSTOP). Found within seconds.
- It has nothing to do, and has had nothing to do for far longer than calls of this kind ever took: a deadlock, a peer or a server
  that never answers. Only seconds count in which no thread of it runs or waits for a core or a disk. So what was learned while the
  machine was quiet holds when it is not.
- The deadline of the recipe (resources.call_timeout_s), whatever it does.

Ranks of one group wait for each other, so what one of them does is done by all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar
from weakref import WeakKeyDictionary

from rlhf_ray.actors.calls import Call, Handle, Member
from rlhf_ray.actors.pulse import ActorProcess, Pulse, pulse
from rlhf_ray.errors import RunFailed

LOOK_S = 3.0  # from one look to the next
STOPPED_S = 5.0  # a debugger may stop a process for a moment
SHORTEST_LIMIT_S = 60.0  # no idle process is taken for hung before
TIMES_AS_LONG = 20.0  # as the longest call of its kind; then an idle one is
WORK_COUNTS = 5.0  # times as much as idleness: a process that works one look in six is not hung
AWAY_S = 5.0  # between two looks at the clock: what is longer, this process itself was stopped


Who = TypeVar("Who")


class AwakeClock:
    """Seconds that this process has been awake: nobody is late because the controller slept."""

    def __init__(self, time: Callable[[], float]):
        self.time = time
        self.now, self._last = 0.0, time()

    def tick(self) -> float:
        before, self._last = self._last, self.time()
        self.now += min(self._last - before, AWAY_S)
        return self.now


class Deadline(RunFailed):
    """Something took longer than the recipe allows."""


class Hung(Deadline):
    """An actor that does not answer."""

    def __init__(self, sentence: str, member: Member, to_blame: Call | None = None):
        """to_blame: the call that it does not end, where that and not the machine is the likely cause."""
        super().__init__(sentence)
        self.member, self.to_blame = member, to_blame


@dataclass(slots=True)
class Silence:
    """Of processes that wait for each other, one of which at least does not do what it should."""

    since: float
    looked: float
    idle_s: float = 0.0
    stopped_since: float | None = None

    @classmethod
    def from_now(cls, now: float) -> Silence:
        return cls(since=now, looked=now)

    def look(
        self, processes: Mapping[Who, ActorProcess | None], now: float, limit_s: float, look: Callable[[ActorProcess], Pulse | None]
    ) -> tuple[Who, str] | None:
        """(the one that is hung, how that was seen); None: none is. processes: None where one is not known.

        limit_s: how long they may be idle, all of them together.
        """
        passed = now - self.looked
        if passed < LOOK_S:
            return None
        self.looked = now
        pulses = {who: look(process) for who, process in processes.items() if process is not None}
        stopped = [who for who, found in pulses.items() if found is not None and found.stopped]
        self.stopped_since = (self.stopped_since or now) if stopped else None
        if self.stopped_since is not None and now - self.stopped_since > STOPPED_S:
            return stopped[0], "is stopped"
        if len(pulses) < len(processes) or any(found is None or found.at_work for found in pulses.values()):
            self.idle_s = max(self.idle_s - WORK_COUNTS * passed, 0.0)
            return None
        self.idle_s += passed
        if self.idle_s > limit_s:
            return next(iter(processes)), f"was idle for {self.idle_s:.0f} s, longer than {limit_s:.0f} s"
        return None


class HungWatch:
    """Learns how long calls of each kind take, and says which actor is hung."""

    def __init__(
        self,
        deadline_s: float,
        there: Callable[[Call], bool],
        look: Callable[[ActorProcess], Pulse | None] = pulse,
    ):
        """deadline_s: of any call. there: whether a call has ended."""
        self.deadline_s, self._there, self._look = deadline_s, there, look
        self._longest_s: dict[tuple[str, str], float] = {}  # role and method -> of the longest call that has ended
        self._silent: WeakKeyDictionary[Call, tuple[int, Silence]] = WeakKeyDictionary()  # how often it was sent; since then

    def ended(self, call: Call, seconds: float, now: float) -> None:
        """seconds: that it has computed, as far as they are known. What it took from outside counts too."""
        sent, silence = self._silent.pop(call, (0, None))
        outside = now - silence.since if silence is not None and sent == call.sent else 0.0
        self.learn(call, max(seconds, outside))

    def learn(self, call: Call, seconds: float) -> None:
        kind = call.member.role, call.method
        self._longest_s[kind] = max(seconds, self._longest_s.get(kind, 0.0))

    def limit_s(self, call: Call) -> float:
        """How long its actor may be idle."""
        longest = self._longest_s.get((call.member.role, call.method))
        return self.deadline_s if longest is None else min(self.deadline_s, max(SHORTEST_LIMIT_S, TIMES_AS_LONG * longest))

    def keeps(self, call: Call) -> Call:
        """The call that keeps this one: an earlier one of its actor, one whose result it needs or that it meets, or itself.

        An actor does what it is asked in order, and calls of another concurrency group beside that.
        """
        queue = [each for each in call.member.calls if each.concurrency_group == call.concurrency_group]
        head = next((each for each in queue if not self._there(each)), call)
        for arg in (*head.args, *head.meets):
            if isinstance(arg, Handle) and not self._there(arg.call):
                return self.keeps(arg.call)
        return head

    def busy_with(self, call: Call, now: float) -> tuple[Call, float]:
        """The call that keeps this one, and since when as far as `hung` has seen."""
        kept_by = self.keeps(call)
        sent, silence = self._silent.get(kept_by, (0, None))
        return kept_by, now - silence.since if silence is not None and sent == kept_by.sent else 0.0

    def hung(self, call: Call, now: float, what: str, remedy: str) -> Hung | None:
        """What is to be said of the actor that keeps this call and is hung; None: none is."""
        kept_by = self.keeps(call)
        sent, silence = self._silent.get(kept_by, (0, Silence.from_now(now)))
        if sent != kept_by.sent:
            silence = Silence.from_now(now)
            self._silent[kept_by] = kept_by.sent, silence
        seconds = now - silence.since
        words = f"waited {seconds:.0f} s for {kept_by.name} during {what}, "
        if seconds > self.deadline_s:
            return Hung(f"{words}longer than {self.deadline_s:.0f} s; {remedy}", kept_by.member, to_blame=kept_by)
        limit_s = self.limit_s(kept_by)
        everyone = {kept_by.member: kept_by.member.process} | {each: each.process for each in kept_by.member.peers}
        found = silence.look(everyone, now, limit_s, self._look)
        if found is None:
            return None
        member, how = found
        if silence.idle_s > limit_s:
            self.learn(kept_by, 2 * limit_s / TIMES_AS_LONG)  # it may have waited for good reason: more patience from now on
        return Hung(f"{words}the process of {member.name} {how}; {remedy}", member)
