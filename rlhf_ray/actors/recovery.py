"""What is done when an actor of the PPO stage dies or hangs. `actors.wait` finds out; the loop never hears of it, or starts again.

- A stateless role (generation, reward, reference, experience): the actor is made again, a generator gets the weights that it had,
  and the calls that were lost with it are sent again. What was finished stays, as results lie in the object store.
- A rank of policy or critic: its whole group is made again (ranks that wait for a dead one in a collective are ended), policy
  and critic get the newest state that there is (`actors.snapshots`, a checkpoint, or the models that PPO starts from), and the
  loop runs again from that step.

Why the loop runs again, and updates are not replayed from kept inputs: all that a step does follows from the step's number and the
state that it begins with (contract 1), which is how a stopped run already goes on from its checkpoint. So going back needs no
code of its own in the loop, keeps no batch, and is exact for every algorithm there is. It costs the
generation of at most `resources.snapshot_every` steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import ray
from ray.exceptions import RayError, RayTaskError

from rlhf_ray.actors.budgets import Budget, Failure, counted, in_short
from rlhf_ray.actors.calls import Call, Handle, Member
from rlhf_ray.actors.faults import tell_step
from rlhf_ray.actors.groups import RayRoles, TrainerGroup
from rlhf_ray.actors.hung import Deadline, Hung
from rlhf_ray.actors.nodes import is_there
from rlhf_ray.actors.snapshots import Snapshot, Snapshots
from rlhf_ray.actors.wait import ActorDied, ArgumentLost, Waiter
from rlhf_ray.actors.weight_meeting import connect_weights
from rlhf_ray.config import PPOConfig, Recipe
from rlhf_ray.errors import NotFinite, RunFailed, whole_message
from rlhf_ray.ppo import checkpoint
from rlhf_ray.ppo.loop import LoopState
from rlhf_ray.runs.events import EventLog

FAIL_S = 10.0  # in which the calls of a dead actor fail
Trained = TypeVar("Trained")


def state_in(folder: Path, ppo: PPOConfig) -> LoopState:
    """The loop's state in a checkpoint. A KL coefficient that does not adapt is the recipe's, which may have changed since."""
    state = LoopState.from_json(checkpoint.read_state(folder))
    return state if ppo.adaptive_kl is not None else replace(state, kl_coef=ppo.kl_coef)


class GroupLost(RunFailed):
    """A rank of policy or critic is gone, and with it the state of its group. The loop has to begin again from an older one."""

    def __init__(self, failure: Failure, member: Member, phase: str):
        """failure: how it was seen."""
        super().__init__(str(failure))
        self.failure, self.member, self.phase, self.seen = failure, member, phase, time.monotonic()


class Recovery:
    """Mends the calls of `roles` (`Waiter.mend`), and takes the loop back where it can't (`run`)."""

    def __init__(
        self,
        recipe: Recipe,
        roles: RayRoles,
        waiter: Waiter,
        checkpoints: Path,
        *,
        budget: Budget,
        events: EventLog,
        progress: Callable[[dict], None],
    ):
        self.recipe, self.resources, self.roles, self.waiter = recipe, recipe.resources, roles, waiter
        self.checkpoints, self.budget, self.events, self.progress = checkpoints, budget, events, progress
        resources = recipe.resources
        self.snapshots = Snapshots(
            roles.trained, waiter, every=resources.snapshot_every, most_bytes=resources.snapshot_gb * 1e9
        )
        self.step = 0  # that the loop has finished
        self.furthest = -1  # that it has ever finished
        self.finished_at: dict[int, float] = {}  # step -> when

    # -- what the loop's hooks tell -----------------------------------------------------------------------------------

    def step_done(self, state: LoopState) -> None:
        """A step, its evaluation included, is finished."""
        self._finished(state.step)
        if state.step > self.furthest:
            self.furthest = state.step
            self.budget.start_over()
        self.snapshots.take(state)

    def _finished(self, step: int) -> None:
        self.step = step
        self.finished_at[step] = time.monotonic()
        tell_step(step)

    # -- one actor ----------------------------------------------------------------------------------------------------

    def mend(self, call: Call, failure: Failure, phase: str) -> None:
        """After this the call is under way again. GroupLost for a rank; RunFailed or the failure where nothing helps."""
        if isinstance(failure, ArgumentLost):
            self._mend_arguments(call, failure, phase)
        elif isinstance(failure, Hung):
            self._replace(failure.member, failure, phase)
        elif isinstance(failure, ActorDied) and call.life == call.member.lives:
            self._replace(call.member, failure, phase)
        elif isinstance(failure, ActorDied) and not self._group_of(call.member):  # its actor was made again meanwhile
            call.send()
        elif isinstance(failure, ActorDied):
            raise self._lost(call.member, failure, phase)
        else:
            self._refuse(call, failure, phase)

    def _mend_arguments(self, call: Call, failure: ArgumentLost, phase: str) -> None:
        """Make the lost arguments again, then send the call again. It was never begun."""
        if len(self._group_of(call.member)) > 1:  # the other ranks have begun it, and wait for this one
            raise self._lost(call.member, failure, phase)
        for arg in call.args:
            if not isinstance(arg, Handle):
                continue
            why = self.waiter.failure_of(arg.call)
            if why is not None:
                self.mend(arg.call, why, phase)
            elif self.waiter.there(arg.call) and not self.waiter.readable(arg):  # it came, but the node where it lay is gone
                if self._group_of(arg.call.member):  # it may have moved on since
                    raise self._lost(arg.call.member, failure, phase)
                arg.call.send_again()
        call.tries += 1
        if call.tries > self.resources.restarts:
            raise failure
        call.send()

    def _refuse(self, call: Call, failure: Failure, phase: str) -> None:
        """An actor's own error is no death. But a rank whose peer has died fails in its own way: a connection is gone; and so does
        who moves weights with it."""
        peers = self._group_of(call.member)
        generation = self.roles.generation
        if generation.by_channel and call.member in (*self.roles.policy.members, *generation.members):
            peers = [*self.roles.policy.members, *generation.members]
        if len(peers) > 1 and not isinstance(failure, NotFinite):
            pings = {member.actor.ready.remote(): member for member in peers}
            for ping in ray.wait(list(pings), num_returns=len(pings), timeout=FAIL_S / 2)[0]:
                try:
                    ray.get(ping, timeout=FAIL_S)
                except RayError as error:  # only a dead one fails at once
                    raise self._lost(pings[ping], ActorDied(whole_message(error)), phase) from failure
        if not isinstance(failure, RayTaskError):
            raise failure
        # A new process may get over it: broken memory, a device, a connection.
        self._replace(call.member, failure, phase, call)

    def _replace(self, member: Member, failure: Failure, phase: str, to_blame: Call | None = None) -> None:
        """Make a stateless actor again and send again what was lost with it."""
        seen = time.monotonic()
        if self._group_of(member) or (member in self.roles.generation.members and self.roles.generation.by_channel):
            raise self._lost(member, failure, phase, to_blame)
        self._charge(member, failure, phase, to_blame or self._head(member, failure))
        while True:
            began = time.monotonic()
            member.make_again()
            lost = self._unanswered(member)
            for call in member.calls:
                if call.brings_weights and call not in lost:  # taken, but not looked at yet
                    member.weights = call
            try:
                self.roles.start([member], [], self.resources.start_timeout_s)
                if member.weights is not None:
                    member.weights.send()
                    self.waiter.wait([Handle(member.weights, 0)], f"weights of {member.name}")
                break
            except (ActorDied, Deadline) as again:
                self._start_failed(member, again, began)
        for call in lost:
            call.send()
        self._tell(member, failure, phase, seen, f"made again, {counted(len(lost), 'call')} sent again", steps_lost=0)

    def _start_failed(self, member: Member, failure: ActorDied | Deadline, began: float) -> None:
        """Its seconds are a part of those that are told when the loss is mended."""
        self.budget.charge_start(failure, f"start of {member.name}")
        self._tell(member, failure, "start", began, "started once more", steps_lost=0)

    def _unanswered(self, member: Member) -> list[Call]:
        """The calls that a dead actor has not answered, in order."""
        sent = [call for call in member.calls if call.sent]
        receipts = [call.receipt for call in sent]
        if receipts:
            ray.wait(receipts, num_returns=len(receipts), timeout=FAIL_S, fetch_local=False)
        return [call for call in sent if self.waiter.failure_of(call) is not None or not self.waiter.there(call)]

    def _head(self, member: Member, failure: Failure) -> Call | None:
        """The call at which it died: actors do what they are asked in order."""
        if isinstance(failure, Hung):
            return failure.to_blame
        return next(iter(self._unanswered(member)), None) if isinstance(failure, ActorDied) else None

    # -- a group of ranks ---------------------------------------------------------------------------------------------

    def run(self, train: Callable[[LoopState], Trained], state: LoopState, folder: Path | None = None) -> Trained:
        """`train` from a state on, which is that of the checkpoint `folder` if there is one. Where a group is lost, again from the
        newest state that there is."""
        self.furthest = state.step
        self._finished(state.step)
        lost: GroupLost | None = None
        while True:
            try:
                if lost is not None:
                    state, lost = self._go_back(lost), None
                elif folder is not None:
                    self._load(None, folder)
                folder = None
                return train(state)
            except GroupLost as again:
                if lost is not None:
                    done = f"its group was made again, and meanwhile {again.member.name} was lost"
                    self._tell(lost.member, lost.failure, lost.phase, lost.seen, done, steps_lost=0)
                lost = again

    def _go_back(self, lost: GroupLost) -> LoopState:
        """Groups of ranks with the newest state there is -> that state."""
        while True:
            began = time.monotonic()
            try:
                return self._try_to_go_back(lost)
            except (ActorDied, Deadline) as again:
                self._start_failed(lost.member, again, began)

    def _try_to_go_back(self, lost: GroupLost) -> LoopState:
        for member in self.roles.members:
            member.calls.clear()  # of the step that is given up
        snapshot, folder = self.snapshots.newest(), checkpoint.last_good(self.checkpoints)
        if snapshot is not None and folder is not None and state_in(folder, self.recipe.ppo).step > snapshot.state.step:
            snapshot = None
        groups = [group for group in self.roles.trained if lost.member in group.members]
        groups = groups or [self.roles.policy]  # a generator's, which shares a channel for weights with the policy
        if snapshot is None and folder is None:
            groups = self.roles.trained
        self._make_again(groups)
        state, source = self._load(snapshot, folder)
        again = self.step - state.step
        self.step = state.step
        tell_step(state.step)
        self.waiter.take_totals()
        done = f"its group was made again, with the state of step {state.step} ({source})"
        since = self.finished_at.get(state.step, lost.seen)
        self._tell(lost.member, lost, lost.phase, since, done, steps_lost=again)
        return state

    def _make_again(self, groups: list[TrainerGroup]) -> None:
        generation = self.roles.generation
        everyone = [member for group in groups for member in group.members]
        channel = generation.by_channel and self.roles.policy in groups
        everyone += generation.members if channel else []
        for member in everyone:
            member.make_again()
        self.roles.start(everyone, groups, self.resources.start_timeout_s)
        if channel:
            waits = self.recipe.ppo.steps_ahead == 0
            connect_weights(self.roles.policy, generation, self.waiter, self.resources, waits=waits)

    def _load(self, snapshot: Snapshot | None, folder: Path | None) -> tuple[LoopState, str]:
        """Give policy and critic the newest state -> it, and where it was."""
        trained = self.roles.trained
        if snapshot is not None:
            loading = [each for group in trained for each in group.call("restore", *snapshot.parts[group.role])]
            try:
                self.waiter.wait(loading, "loading the snapshot")
            except (ArgumentLost, GroupLost):
                self.snapshots.drop(snapshot)  # its node may be gone
                raise
            return snapshot.state, "snapshot"
        if folder is not None:
            loading = [each for group in trained for each in group.call("load", folder)]
            self.waiter.wait(loading, "loading the checkpoint")
            return state_in(folder, self.recipe.ppo), folder.name
        return LoopState(kl_coef=self.recipe.ppo.kl_coef), "the start"

    # -- words --------------------------------------------------------------------------------------------

    def _group_of(self, member: Member) -> list[Member]:
        """The ranks of its group; none for a stateless role."""
        return next((list(group.members) for group in self.roles.trained if member in group.members), [])

    def _lost(self, member: Member, failure: Failure, phase: str, to_blame: Call | None = None) -> GroupLost:
        self._charge(member, failure, phase, to_blame or self._head(member, failure))
        return GroupLost(failure, member, phase)

    def _charge(self, member: Member, failure: Failure, phase: str, call: Call | None = None) -> None:
        host = None if member.process is None or is_there(member.process.node) else member.process.node
        self.budget.charge(member, failure, f"after step {self.step}, {phase}", call, host)

    def _tell(self, member: Member, failure: Failure, phase: str, since: float, done: str, *, steps_lost: int) -> None:
        """since: when what is lost was begun."""
        seconds, seen = time.monotonic() - since, in_short(failure)
        self.events.add(
            f"{member.name} was lost", done, seconds, stage="ppo", role=member.role, step=self.step + steps_lost,
            phase=phase, seen=seen, steps_lost=steps_lost,
        )  # fmt: skip
        words = f"{member.name} was lost after step {self.step + steps_lost}, {phase}: {seen}"
        lost = f"{seconds:.1f} s" + (f" and {counted(steps_lost, 'finished step')}" if steps_lost else "")
        self.progress({"stage": "ppo", "say": f"{words}; {done}; {lost} lost", "warns": True})
