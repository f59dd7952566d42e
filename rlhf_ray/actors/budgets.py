"""How often actors of the PPO stage are made again before the run stops, and what is to blame: the machine, or a sample."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from ray.exceptions import RayTaskError

from rlhf_ray.actors.calls import Call, Member
from rlhf_ray.actors.low_memory import REMEDY
from rlhf_ray.errors import RunFailed, whole_message
from rlhf_ray.runs.events import EventLog

DEATHS_OF_A_CALL = 2  # then the call is to blame, not the machine
SHOWN_SAMPLES = 8
Failure = RunFailed | RayTaskError


#: hears (the actor, how its loss was seen, where, what stops the run)
Ended = Callable[[Member | None, Failure, str, Failure], None]


def unheard(member: Member | None, failure: Failure, where: str, why: Failure) -> None:
    """Nobody is told."""


def tells_of_end(events: EventLog, progress: Callable[[dict], None], stage: str) -> Ended:
    """An event and a line for the loss after which no actor is made again."""

    def ended(member: Member | None, failure: Failure, where: str, why: Failure) -> None:
        name, seen = "an actor at the start" if member is None else member.name, in_short(failure)
        reason = in_short(why) if why is not failure else _single_words(why)
        done = f"not made again: {reason}; the run stops"
        what = f"{name} was lost"
        with suppress(OSError):  # a full disk has no room for it
            role = None if member is None else member.role
            events.add(what, done, stage=stage, role=role, phase=where, seen=seen, budget_ended=True)
        progress({"stage": stage, "say": f"{what}, {where}: {seen}; {done}", "warns": True})

    return ended


def _single_words(why: Failure) -> str:
    """Where the loss itself stops the run."""
    return "its own code fails" if isinstance(why, RayTaskError) else "it can't be, or resources.restarts = 0"


class Budget:
    """Counts what was lost since a step was finished that had never been finished before."""

    def __init__(self, restarts: int, ended: Ended = unheard):
        """restarts: so many are allowed in a row; 0: the first failure is raised as it is. ended: hears when there are no more,
        before the run stops."""
        self.restarts, self.ended = restarts, ended
        self.failures: Counter[str] = Counter()  # role -> restarts since `take_failures`
        self._lost: list[str] = []
        self._hosts: set[str] = set()  # that are gone
        self._deaths: Counter[Any] = Counter()  # what a call does -> actors that died at it

    def start_over(self) -> None:
        """There is progress."""
        self._lost.clear()
        self._deaths.clear()

    def charge_start(self, failure: Failure, where: str) -> None:
        """Count a failed start of actors. One that the role's own code fails would fail again."""
        try:
            self._charge_start(failure, where)
        except (RunFailed, RayTaskError) as why:
            self.ended(None, failure, where, why)
            raise

    def _charge_start(self, failure: Failure, where: str) -> None:
        own = isinstance(failure, RayTaskError)  # or a peer's connection that broke
        self._deaths["start"] += own
        if self.restarts == 0 or "creation task" in str(failure) or (own and self._deaths["start"] >= DEATHS_OF_A_CALL):
            raise failure
        self._lose(failure, f"{where}: {in_short(failure)}")

    def take_failures(self) -> dict[str, float]:
        """failures/<role> since the last call, for the metrics."""
        counts = {f"failures/{role}": float(count) for role, count in self.failures.items()}
        self.failures.clear()
        return counts

    def charge(
        self, member: Member, failure: Failure, where: str, call: Call | None = None, host: str | None = None
    ) -> None:
        """Count an actor that is to be made again. RunFailed where there were too many, or one call has ended two.

        where: "after step 3, scoring (step 3)". call: the one that the actor died at, if it is known. host: the actor's, if that is
        gone; then it is one loss, however many actors were there, and no call is to blame.
        """
        try:
            self._charge(member, failure, where, call, host)
        except (RunFailed, RayTaskError) as why:
            self.ended(member, failure, where, why)
            raise

    def _charge(self, member: Member, failure: Failure, where: str, call: Call | None, host: str | None) -> None:
        if self.restarts == 0:
            raise failure
        self.failures[member.role] += 1
        if host is not None:
            if host not in self._hosts:
                self._hosts.add(host)
                self._lose(failure, f"{where}: the host of {member.name}: {in_short(failure)}")
            return
        own = isinstance(failure, RayTaskError)
        if call is not None and (own or call.chunks()):  # else a rank that writes or sends its state: no sample is to blame
            work = member.role, call.method, *(call.chunks() or [call.name])
            self._deaths[work] += 1
            if self._deaths[work] >= DEATHS_OF_A_CALL:
                self._blame(member, failure, where, call)
        self._lose(failure, f"{where}: {member.name}: {in_short(failure)}")

    def _blame(self, member: Member, failure: Failure, where: str, call: Call) -> None:
        samples = _samples_of(call)
        remedy = _remedy(failure, "see the run folder's logs/, mend what ends it or take the sample out of the data")
        if isinstance(failure, RayTaskError):  # its traceback says more
            failure.add_note(f"{call.name} failed {DEATHS_OF_A_CALL} times, {where}, so no third try is made. {samples}")
            raise failure
        raise RunFailed(
            f"{member.name} died {DEATHS_OF_A_CALL} times at the same call, {call.method} of {call.name}, {where}, so no third try "
            f"is made. {samples}Last: {in_short(failure)}; {remedy}, then run the same command again"
        ) from failure

    def _lose(self, failure: Failure, line: str) -> None:
        self._lost.append(line)
        if len(self._lost) > self.restarts:
            table = "\n".join(f"  {line}" for line in self._lost)
            remedy = _remedy(failure, "look in the run folder's logs/")
            raise RunFailed(
                f"{len(self._lost)} actors were lost without a finished step between, more than resources.restarts = "
                f"{self.restarts}; {remedy}, then run the same command again\n{table}"
            ) from failure


def in_short(failure: Failure) -> str:
    """How it was seen, without the remedy."""
    return whole_message(failure).partition("; ")[0]


def _remedy(failure: Failure, otherwise: str) -> str:
    return REMEDY if REMEDY in str(failure) else otherwise


def counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _samples_of(call: Call) -> str:
    samples = [chunk.where(row) for chunk in call.chunks() for row in range(len(chunk.prompt_indices))]
    if not samples:
        return ""
    more = len(samples) - SHOWN_SAMPLES
    return f"Its samples: {'; '.join(samples[:SHOWN_SAMPLES])}{f' and {more} more' if more > 0 else ''}. "
