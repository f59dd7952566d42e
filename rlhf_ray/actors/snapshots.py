"""The newest states of policy and critic, in the object store: a rank that dies takes none of them along.

Contract 5 of the design calls the store a wire, not a warehouse. This is the one thing that lies there for longer than a step:
two states at most, and none where they would take more than `resources.snapshot_gb`. The store is the memory of another process
(Ray's own, on the node of the rank). What is lost with a whole node is on disk, in the last checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from rlhf_ray.actors.calls import Handle
from rlhf_ray.actors.groups import TrainerGroup
from rlhf_ray.actors.nodes import is_there
from rlhf_ray.actors.wait import Waiter
from rlhf_ray.ppo.loop import LoopState

KEPT = 2  # the newest may not be whole yet
BYTES_PER_WEIGHT_BYTE = 3  # a weight and Adam's two moments, all float32


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """What the loop and its groups were after a step."""

    state: LoopState
    parts: dict[str, list[Handle]]  # role -> each rank's share of its state, beside the number of optimiser steps
    nodes: frozenset[str] = frozenset()  # of the cluster, where they lie
    taken: float = field(default_factory=time.monotonic)

    def whole(self, waiter: Waiter) -> bool:
        """Whether every rank has handed in its share."""
        calls = {handle.call for handles in self.parts.values() for handle in handles}
        for call in calls:
            if not call.finished:
                if not waiter.there(call) or waiter.failure_of(call) is not None:
                    return False
                call.finish()
        return True


class Snapshots:
    """Takes one every so many steps. Nobody waits for it: the ranks hand it in before they do what they are asked next.

    One that fails is only left out: a rank that has died is found out by whoever asks it next.
    """

    def __init__(self, groups: Sequence[TrainerGroup], waiter: Waiter, *, every: int, most_bytes: float):
        """most_bytes: that they may take altogether."""
        self.groups, self.waiter, self.every = groups, waiter, every
        self.bytes = KEPT * BYTES_PER_WEIGHT_BYTE * sum(group.weight_bytes for group in groups)
        self.fits = self.bytes <= most_bytes
        self.kept: list[Snapshot] = []  # oldest first

    def take(self, state: LoopState) -> None:
        """Ask for one, if the step's turn has come."""
        if not self.fits or state.step % self.every != 0:
            return
        self.kept = [each for each in self.kept if each.whole(self.waiter)][1 - KEPT :]
        members = [member for group in self.groups for member in group.members]
        nodes = frozenset(member.process.node for member in members if member.process is not None)
        self.kept.append(Snapshot(state, {group.role: group.snapshot() for group in self.groups}, nodes))

    def newest(self) -> Snapshot | None:
        """The newest whole one. Those that are not whole go, or whose node is gone."""
        self.kept = [each for each in self.kept if all(map(is_there, each.nodes)) and each.whole(self.waiter)]
        return self.kept[-1] if self.kept else None

    def drop(self, snapshot: Snapshot) -> None:
        """It can't be read."""
        self.kept.remove(snapshot)
