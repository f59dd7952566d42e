"""The remote calls of the PPO loop, as things that can be sent again, and the actors that they go to.

What a call returns follows from its method, its arguments and the weights that its actor holds: every draw is seeded by the
recipe's seed and the chunk, which is an argument. So a call that is sent again, to whichever actor, returns the same bits. Only
the ranks of policy and critic hold more than that (`actors.recovery`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ray

from rlhf_ray.actors.pulse import ActorProcess, end
from rlhf_ray.messages import Chunk


class Member:
    """One actor of a role: which one it is, how it is made, and what it was asked and has not been seen to answer."""

    def __init__(self, role: str, number: int, make: Callable[[], Any], word: str = "actor", needs: str = ""):
        """make: starts the actor. word: "rank" for one of a DeepSpeed group. needs: what it waits for until a host has it free, in
        words."""
        self.role, self.number, self.word, self.needs = role, number, word, needs
        self._make, self.actor = make, make()
        self.lives = 1  # how often it was made
        self.calls: list[Call] = []  # in the order in which they were sent
        self.weights: Call | None = None  # of a generator: the newest that it has taken
        self.process: ActorProcess | None = None  # None: not known yet
        self.peers: Sequence[Member] = ()  # those that it waits for in collective calls, itself included
        self.unasked: list[Call] = []  # what it may be at beside `calls`, though nobody waits for it (`actors.stragglers`)

    @property
    def name(self) -> str:
        return f"{self.role} {self.word} {self.number}"

    def make_again(self) -> None:
        """End the actor, if it has not ended, and start it again. `calls` and `weights` stay, to be sent again."""
        ray.kill(self.actor)
        if self.process is not None:
            end(self.process)
        self.actor, self.process = self._make(), None
        self.unasked.clear()
        self.lives += 1

    def call(self, method: str, *args: Any, name: str, **options: Any) -> list[Handle]:
        """Send a call -> its results. args: what a handle stands for goes in its place. options: see `Call`.

        One that needs the result of a movable call is sent when that is there (`actors.stragglers`), and so is what follows it.
        """
        call = Call(self, method, args, name, **options)
        if call.due and all(each.sent or each.concurrency_group != call.concurrency_group for each in self.calls):
            call.send()
        self.calls.append(call)
        return [Handle(call, number) for number in range(call.returns)]


def members(role: str, actors: Sequence[Any]) -> list[Member]:
    """Actors that are there already, as members."""
    return [Member(role, number, lambda actor=actor: actor) for number, actor in enumerate(actors)]


class Call:
    """One remote call of the loop. `refs` are those of the last time that it was sent.

    Handles hold their call, and a call its arguments, but nothing holds a finished call that no handle does: what it returned
    goes from the object store when the loop lets go of it.
    """

    def __init__(
        self,
        member: Member,
        method: str,
        args: tuple[Any, ...],
        name: str,
        *,
        returns: int = 1,
        receipt: bool = False,
        account: str | None = None,
        concurrency_group: str | None = None,
        brings_weights: bool = False,
        movable: bool = False,
    ):
        """name: "reward actor 1 (step 17, chunk 3)". returns: results, without the receipt that comes beside them if
        `receipt`. account: what the receipt's seconds and bytes are added to; None: the role. brings_weights: after it, its actor
        computes with other weights than before. movable: another actor of the role may answer it too."""
        self.member, self.method, self.args, self.name = member, method, args, name
        self.account, self.concurrency_group = account or member.role, concurrency_group
        self.returns, self.count, self.brings_weights = returns, returns + receipt, brings_weights
        self.movable, self.copied = movable, False  # and whether it was given to another one
        self.refs: list[ray.ObjectRef] = []
        self.sent = 0  # how often
        self.sent_with: list[int] = []  # how often those had been sent whose results it was sent with
        self.life = 0  # that of the member to which it was sent
        self.tries = 0  # how often it was sent again for the sake of an argument
        self.beside: list[Handle] = []  # who waits for this call waits for these too; no caller has them
        self.meets: list[Handle] = []  # calls of others without which it does not end, though it has no results of theirs
        self.finished = False  # and was looked at

    def send(self) -> None:
        # getattr: Ray makes an actor's methods as attributes of its handle, and has no other way to name one.
        remote = getattr(self.member.actor, self.method)
        group = {} if self.concurrency_group is None else {"concurrency_group": self.concurrency_group}
        given = [arg.ref if isinstance(arg, Handle) else arg for arg in self.args]
        refs = remote.options(num_returns=self.count, **group).remote(*given)
        self.refs = [refs] if self.count == 1 else refs
        self.sent += 1
        self.sent_with = [call.sent for call in self.needed]
        self.life, self.finished = self.member.lives, False

    def send_again(self) -> None:
        """It was answered, but what it returned is lost."""
        self.member.calls.append(self)
        self.send()

    @property
    def needed(self) -> list[Call]:
        """Those whose results are its arguments."""
        return [arg.call for arg in self.args if isinstance(arg, Handle)]

    @property
    def overtaken(self) -> bool:
        """Whether one of those was sent again since this call was sent, so that it has the results of the one before."""
        return self.sent_with != [call.sent for call in self.needed]

    @property
    def due(self) -> bool:
        """Whether it can be sent: no other actor than the one that was asked will answer what it needs."""
        return all(call.settled for call in self.needed)

    @property
    def settled(self) -> bool:
        """Whether its refs stay, unless its actor dies. Ray takes no call back that waits for an argument."""
        return self.finished or (self.sent > 0 and not self.movable)

    @property
    def receipt(self) -> ray.ObjectRef:
        """What is looked at: the receipt, or else the result, which is small."""
        return self.refs[-1]

    def finish(self) -> None:
        """It was looked at, and has not failed."""
        self.finished, self.meets = True, []
        if self.brings_weights:
            self.member.weights = self
        if self in self.member.calls:
            self.member.calls.remove(self)

    def chunks(self) -> list[Chunk]:
        """Those that it works on, as far as its arguments tell."""
        found: list[Chunk] = []
        for arg in self.args:
            if isinstance(arg, Chunk):
                found.append(arg)
            elif isinstance(arg, Handle):
                found += [chunk for chunk in arg.call.chunks() if chunk not in found]
        return found


class Handle:
    """A result of a call, which the loop passes on before it is there."""

    __slots__ = ("call", "number")

    def __init__(self, call: Call, number: int):
        self.call, self.number = call, number

    @property
    def ref(self) -> ray.ObjectRef:
        return self.call.refs[self.number]
