"""The roles as groups of actors, with the methods of `ppo.step.Roles`. Handles are those of `actors.calls`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_ray.actors.calls import Handle, Member
from rlhf_ray.actors.role_actors import IN_FLIGHT, SENDING
from rlhf_ray.actors.wait import START_REMEDY, Waiter
from rlhf_ray.actors.weight_transport import Transport
from rlhf_ray.messages import Chunk

WEIGHT_PART_BYTES = 256 * 1024**2
Handles = Sequence[Handle]


class GenerationGroup:
    """Chunk i goes to actor i modulo their number. The result does not depend on which actor that is."""

    def __init__(self, members: Sequence[Member], in_flight: bool = False, sleeps: bool = False):
        """in_flight: an actor takes new weights between two chunks. Otherwise it first draws all chunks that it was asked for.

        sleeps: an actor frees its GPU memory after the last chunk that it was asked for.
        """
        self.members, self.in_flight, self.sleeps = members, in_flight, sleeps
        self.by_channel = False  # `actors.weight_meeting`
        self.movable = False  # `actors.stragglers`
        self.staged_by: PolicyGroup | None = None  # the channel's sender, where it trains on while it sends

    def generate(self, chunks: Sequence[Chunk]) -> list[Handle]:
        handles = []
        for i, chunk in enumerate(chunks):
            member = self.members[i % len(self.members)]
            last = (True,) if self.sleeps and i + len(self.members) >= len(chunks) else ()
            name = f"{member.name} (step {chunk.step}, chunk {chunk.index})"
            handles += member.call("generate", chunk, *last, name=name, receipt=True, movable=self.movable)
        return handles

    def load_weights(self, weights: Handles, policy_version: int) -> list[Handle]:
        methods = (
            ("receive_weights", "receive_weights_in_flight")
            if self.by_channel
            else ("load_weights", "update_weights_in_flight")
        )
        group = IN_FLIGHT if self.in_flight else None
        # By the channel an actor receives while the policy sends: `weights` only tell that those are sent, or staged.
        parts = () if self.by_channel else weights
        handles = []
        for member in self.members:
            name = f"{member.name} (weights of version {policy_version})"
            options = {"concurrency_group": group, "brings_weights": True}
            handles += member.call(methods[self.in_flight], policy_version, *parts, name=name, **options)
        if self.staged_by is not None:
            (sent,) = handles[0].call.beside = self.staged_by.send_staged(weights[0])
            sent.call.meets = handles  # it waits until all generators receive: what they draw before keeps it
        elif self.by_channel:
            weights[0].call.beside = handles  # the policy sends until all have received: it would wait for one that died
        return handles


class ChunkGroup:
    """Actors that turn each rollout into one small result: scores, reference log-probs, old log-probs, values."""

    movable = False  # `actors.stragglers`

    def __init__(self, members: Sequence[Member]):
        self.members = members

    def _each(self, method: str, rollouts: Handles) -> list[Handle]:
        handles = []
        for i, rollout in enumerate(rollouts):
            member = self.members[i % len(self.members)]
            handles += member.call(method, rollout, name=f"{member.name} (chunk {i})", receipt=True, movable=self.movable)
        return handles


class RewardGroup(ChunkGroup):
    def score(self, rollouts: Handles) -> list[Handle]:
        return self._each("score", rollouts)

    def judge(self, rollouts: Handles) -> list[Handle]:
        return self._each("judge", rollouts)

    def texts(self, rollout: Handle, count: int) -> Handle:
        (handle,) = self.members[0].call("texts", rollout, count, name=f"{self.members[0].name} (texts)")
        return handle


class ReferenceGroup(ChunkGroup):
    def logprobs(self, rollouts: Handles) -> list[Handle]:
        return self._each("logprobs", rollouts)


class TrainerGroup(ChunkGroup):
    """The ranks of a DeepSpeed group. A collective call goes to all of them."""

    weight_bytes = 0  # of what trains, in float32
    turn_after: TrainerGroup | None = None  # the group whose update comes first, on the same GPUs
    updating: Handles = ()  # the newest update, until somebody has waited for its turn
    start: Path  # the model that it is built from

    def __init__(self, members: Sequence[Member]):
        super().__init__(members)
        for member in members:
            member.peers = members

    @property
    def role(self) -> str:
        return self.members[0].role

    def _forward(self, method: str, rollouts: Handles) -> list[Handle]:
        """Like `_each`, with equally many forward passes on every rank.

        A ZeRO-3 forward pass gathers from all ranks. If one rank has a pass less, the others wait forever.
        """
        short = -len(rollouts) % len(self.members)
        results = self._each(method, [*rollouts, *[rollouts[0]] * short])
        results, surplus = results[: len(rollouts)], results[len(rollouts) :]
        # A surplus pass that fails blocks the other ranks. So whoever waits for the first result waits for these too.
        results[0].call.beside = surplus
        return results

    def update(self, shards: Handles, *rates: float) -> list[Handle]:
        handles, before = [], self._before()
        for member, shard in zip(self.members, shards, strict=True):
            name, account = f"{member.name} (update)", f"{member.role}_update"
            handles += member.call("update", shard, rates, *before, name=name, receipt=True, account=account)
        self.updating = handles
        return handles

    def _before(self) -> list[Handle]:
        """What an update waits for: it is not begun before these are there."""
        if self.turn_after is None:
            return []
        before, self.turn_after.updating = self.turn_after.updating, ()
        return list(before)

    def call(self, method: str, *args: Any) -> list[Handle]:
        return [
            handle for member in self.members for handle in member.call(method, *args, name=f"{member.name} ({method})")
        ]

    def snapshot(self) -> list[Handle]:
        """Each rank's share of the state, beside the number of optimiser steps."""
        return [
            handle
            for member in self.members
            for handle in member.call("snapshot", name=f"{member.name} (snapshot)", returns=2)
        ]


class PolicyGroup(TrainerGroup):
    transport: Transport = "object_store"  # `actors.weight_meeting`
    stages = False  # over a channel: it copies its weights and trains on, and sends the copy meanwhile

    def logprobs(self, rollouts: Handles) -> list[Handle]:
        return self._forward("logprobs", rollouts)

    def reference_logprobs(self, rollouts: Handles) -> list[Handle]:
        return self._forward("reference_logprobs", rollouts)

    def weights(self) -> list[Handle]:
        """Rank 0's parts, and one empty part of each other rank. All ranks make the call, because ZeRO-3 gathers from all.

        Over a channel the parts are empty: the generators receive the weights while the policy sends them (`send_staged`).
        """
        method, args, parts = "stage_weights" if self.stages else "send_weights", (), 1
        if self.transport == "object_store":
            parts = max(1, -(-self.weight_bytes // WEIGHT_PART_BYTES))
            method, args = "weights", (parts,)
        elif self.transport == "ipc":
            method, args = "shared_weights", (1,)
        answers = [
            member.call(
                method, *args, name=f"{member.name} (weights)", returns=parts, receipt=True, account="policy_sync"
            )
            for member in self.members
        ]
        return [*answers[0], *(others[0] for others in answers[1:])]

    def send_staged(self, staged: Handle) -> list[Handle]:
        """Rank 0 sends what it has staged, beside what else it is asked."""
        first = self.members[0]
        return first.call(
            "send_staged", staged, name=f"{first.name} (sending weights)", receipt=True, account="policy_sync",
            concurrency_group=SENDING,
        )  # fmt: skip


class AdapterOff:
    """The reference without actors of its own. The policy with its adapter off is the model that PPO started from."""

    def __init__(self, policy: PolicyGroup):
        self.policy = policy

    def logprobs(self, rollouts: Handles) -> list[Handle]:
        return self.policy.reference_logprobs(rollouts)


class CriticGroup(TrainerGroup):
    def values(self, rollouts: Handles) -> list[Handle]:
        return self._forward("values", rollouts)


class ExperienceHandle:
    def __init__(self, member: Member, policy_ranks: int, critic_ranks: int, group_size: int):
        self.member, self.group_size = member, group_size
        self.policy_ranks, self.critic_ranks = policy_ranks, critic_ranks

    def assemble(
        self, rollouts: Handles, scores: Handles, ref_logprobs: Handles, old_logprobs: Handles, old_values: Handles,
        kl_coef: float,
    ) -> tuple[Handle, list[Handle], list[Handle]]:  # fmt: skip
        """(statistics, the policy's shards, the critic's shards)."""
        stats, *shards = self.member.call(
            "assemble", len(rollouts), kl_coef, *rollouts, *scores, *ref_logprobs, *old_logprobs, *old_values,
            name="experience", returns=1 + self.policy_ranks + self.critic_ranks, receipt=True,
        )  # fmt: skip
        return stats, shards[: self.policy_ranks], shards[self.policy_ranks :]

    def own_mismatch(self, rollouts: Handles, logprobs: Handles) -> Handle:
        return self._one("own_mismatch", len(rollouts), *rollouts, *logprobs, name="experience (mismatch)")

    def zero_variance(self, rollouts: Handles, scores: Handles) -> Handle:
        return self._one("zero_variance", len(rollouts), *rollouts, *scores, name="experience (zero-variance groups)")

    def pack(
        self, rollouts: Handles, scores: Handles, prompts: int, chunk_size: int
    ) -> tuple[list[Handle], list[Handle]]:
        """(rollouts, scores) of `prompts` prompts, in chunks of chunk_size."""
        chunks = -(-prompts * self.group_size // chunk_size)
        packed = self.member.call(
            "pack", len(rollouts), prompts, chunk_size, *rollouts, *scores,
            name="experience (pack)", returns=2 * chunks, receipt=True,
        )  # fmt: skip
        return packed[:chunks], packed[chunks:]

    def evaluate(self, rollouts: Handles, scores: Handles, ref_logprobs: Handles, judged: Handles) -> Handle:
        parts = *rollouts, *scores, *ref_logprobs, *judged
        return self._one("evaluate", len(rollouts), *parts, name="experience (evaluation)")

    def _one(self, method: str, *args: Any, name: str) -> Handle:
        (handle,) = self.member.call(method, *args, name=name)
        return handle


class RayRoles:
    """`ppo.step.Roles` over actors."""

    def __init__(
        self,
        generation: GenerationGroup,
        reward: RewardGroup,
        reference: ReferenceGroup | AdapterOff,
        policy: PolicyGroup,
        critic: CriticGroup | None,
        experience: ExperienceHandle,
        waiter: Waiter,
    ):
        self.generation, self.reward, self.reference = generation, reward, reference
        self.policy, self.critic, self.experience, self.waiter = policy, critic, experience, waiter

    def wait(self, handles: Handles, what: str) -> None:
        self.waiter.wait(handles, what)

    def get(self, handles: Handles, what: str) -> list[Any]:
        return self.waiter.get(handles, what)

    @property
    def trained(self) -> list[TrainerGroup]:
        return [self.policy] if self.critic is None else [self.policy, self.critic]

    @property
    def members(self) -> list[Member]:
        stateless = [*self.generation.members, *self.reward.members, self.experience.member]
        reference = [] if isinstance(self.reference, AdapterOff) else self.reference.members
        return [*stateless, *reference, *(member for group in self.trained for member in group.members)]

    def let_move(self) -> list[Sequence[Member]]:
        """Calls of stateless roles with several actors are movable from now on -> those actors, by role.

        Not of generators that take weights while they draw, or that free their GPU's memory after the last chunk that they know of.
        """
        stateless: list[GenerationGroup | ChunkGroup] = [self.reward]
        stateless += [] if self.generation.in_flight or self.generation.sleeps else [self.generation]
        stateless += [] if isinstance(self.reference, AdapterOff) else [self.reference]
        several = [group for group in stateless if len(group.members) > 1]
        for group in several:
            group.movable = True
        return [group.members for group in several]

    def start(self, members: Sequence[Member], groups: Sequence[TrainerGroup], deadline_s: float) -> None:
        """Until these are ready to work, and the ranks of these DeepSpeed groups have met."""
        names = [f"{member.name} (start{member.needs and f' on {member.needs}'})" for member in members]
        starting = [self.waiter.track(member.actor.ready.remote(), name) for member, name in zip(members, names, strict=True)]
        self._join(groups, deadline_s)
        processes = self.waiter.get(starting, "start of the actors", deadline_s, START_REMEDY)
        for member, process in zip(members, processes, strict=True):
            member.process = process

    def _join(self, groups: Sequence[TrainerGroup], deadline_s: float) -> None:
        """The ranks of each DeepSpeed group meet at its rank 0."""
        places = [
            handle
            for group in groups
            for handle in group.members[0].call("address", name=f"{group.members[0].name} (address)")
        ]
        places = self.waiter.get(places, "start of the trainers", deadline_s, START_REMEDY)
        joining = [group.call("join", group.start, *place) for group, place in zip(groups, places, strict=True)]
        for group, handles in zip(groups, joining, strict=True):
            answers = self.waiter.get(handles, f"start of the {group.role} group", deadline_s, START_REMEDY)
            group.weight_bytes = answers[0]
