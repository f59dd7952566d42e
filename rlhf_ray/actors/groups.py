"""The roles as groups of actors, with the methods of `ppo.step.Roles`. Handles are ObjectRefs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from rlhf_ray.actors.role_actors import IN_FLIGHT
from rlhf_ray.actors.wait import START_REMEDY, Waiter
from rlhf_ray.actors.weight_transport import Transport, choose_transport
from rlhf_ray.config import ResourcesConfig
from rlhf_ray.messages import Chunk

WEIGHT_PART_BYTES = 256 * 1024**2
Refs = Sequence[ray.ObjectRef]


class GenerationGroup:
    """Chunk i goes to actor i modulo their number. The result does not depend on which actor that is."""

    def __init__(self, actors: Sequence[Any], waiter: Waiter, in_flight: bool = False, sleeps: bool = False):
        """in_flight: an actor takes new weights between two chunks. Otherwise it first draws all chunks that it was asked for.

        sleeps: an actor frees its GPU memory after the last chunk that it was asked for.
        """
        self.actors, self.waiter, self.in_flight, self.sleeps = actors, waiter, in_flight, sleeps
        self.by_channel = False  # `connect_weights`

    def generate(self, chunks: Sequence[Chunk]) -> list[ray.ObjectRef]:
        handles = []
        for i, chunk in enumerate(chunks):
            number = i % len(self.actors)
            last = (True,) if self.sleeps and i + len(self.actors) >= len(chunks) else ()
            rollout, receipt = self.actors[number].generate.options(num_returns=2).remote(chunk, *last)
            name = f"generation actor {number} (step {chunk.step}, chunk {chunk.index})"
            handles.append(self.waiter.track(rollout, name, receipt))
        return handles

    def load_weights(self, weights: Refs, policy_version: int) -> list[ray.ObjectRef]:
        return [
            self.waiter.track(
                self._take(actor, policy_version, weights),
                f"generation actor {number} (weights of version {policy_version})",
            )
            for number, actor in enumerate(self.actors)
        ]

    def _take(self, actor: Any, policy_version: int, weights: Refs) -> ray.ObjectRef:
        if self.by_channel:  # the actor receives while the policy sends; `weights` only tell that the sending has ended
            return actor.receive_weights.remote(policy_version)
        if self.in_flight:
            update = actor.update_weights_in_flight.options(concurrency_group=IN_FLIGHT)
        else:
            update = actor.load_weights
        return update.remote(policy_version, *weights)


class ChunkGroup:
    """Actors that turn each rollout into one small result: scores, reference log-probs, old log-probs, values."""

    def __init__(self, role: str, actors: Sequence[Any], waiter: Waiter):
        self.role, self.actors, self.waiter = role, actors, waiter

    def _each(self, method: str, rollouts: Refs) -> list[ray.ObjectRef]:
        handles = []
        for i, rollout in enumerate(rollouts):
            number = i % len(self.actors)
            # getattr: Ray makes an actor's methods as attributes of its handle, and has no other way to name one.
            call = getattr(self.actors[number], method).options(num_returns=2)
            result, receipt = call.remote(rollout)
            handles.append(self.waiter.track(result, f"{self.role} actor {number} (chunk {i})", receipt))
        return handles


class RewardGroup(ChunkGroup):
    def score(self, rollouts: Refs) -> list[ray.ObjectRef]:
        return self._each("score", rollouts)

    def judge(self, rollouts: Refs) -> list[ray.ObjectRef]:
        return self._each("judge", rollouts)

    def texts(self, rollout: ray.ObjectRef, count: int) -> ray.ObjectRef:
        return self.waiter.track(self.actors[0].texts.remote(rollout, count), "reward actor 0 (texts)")


class ReferenceGroup(ChunkGroup):
    def logprobs(self, rollouts: Refs) -> list[ray.ObjectRef]:
        return self._each("logprobs", rollouts)


class TrainerGroup(ChunkGroup):
    """The ranks of a DeepSpeed group. A collective call goes to all of them."""

    def _forward(self, method: str, rollouts: Refs) -> list[ray.ObjectRef]:
        """Like `_each`, with equally many forward passes on every rank.

        A ZeRO-3 forward pass gathers from all ranks. If one rank has a pass less, the others wait forever.
        """
        short = -len(rollouts) % len(self.actors)
        results = self._each(method, [*rollouts, *[rollouts[0]] * short])
        results, surplus = results[: len(rollouts)], results[len(rollouts) :]
        # A surplus pass that fails blocks the other ranks. So whoever waits for the first result waits for these too.
        self.waiter.put_beside(surplus, results[0])
        return results

    def update(self, shards: Refs, *rates: float) -> list[ray.ObjectRef]:
        handles = []
        for rank, (actor, shard) in enumerate(zip(self.actors, shards, strict=True)):
            stats, receipt = actor.update.options(num_returns=2).remote(shard, *rates)
            name = f"{self.role} rank {rank} (update)"
            handles.append(self.waiter.track(stats, name, receipt, account=f"{self.role}_update"))
        return handles

    def call(self, method: str, *args: Any) -> list[ray.ObjectRef]:
        return [
            # getattr: as in `_each`.
            self.waiter.track(getattr(actor, method).remote(*args), f"{self.role} rank {rank} ({method})")
            for rank, actor in enumerate(self.actors)
        ]


class PolicyGroup(TrainerGroup):
    weight_bytes = 0  # of what trains, in float32
    transport: Transport = "object_store"  # `connect_weights`

    def logprobs(self, rollouts: Refs) -> list[ray.ObjectRef]:
        return self._forward("logprobs", rollouts)

    def reference_logprobs(self, rollouts: Refs) -> list[ray.ObjectRef]:
        return self._forward("reference_logprobs", rollouts)

    def weights(self) -> list[ray.ObjectRef]:
        """Rank 0's parts, and one empty part of each other rank. All ranks make the call, because ZeRO-3 gathers from all.

        Over a channel the parts are empty: the generators receive the weights while the policy sends them.
        """
        if self.transport == "object_store":
            parts = max(1, -(-self.weight_bytes // WEIGHT_PART_BYTES))
            answers = [actor.weights.options(num_returns=parts + 1).remote(parts) for actor in self.actors]
        elif self.transport == "ipc":
            answers = [actor.shared_weights.options(num_returns=2).remote(1) for actor in self.actors]
        else:
            answers = [actor.send_weights.options(num_returns=2).remote() for actor in self.actors]
        for rank, (first, *_, receipt) in enumerate(answers):
            self.waiter.track(first, f"policy rank {rank} (weights)", receipt, account="policy_sync")
        return [*answers[0][:-1], *(others[0] for others in answers[1:])]


def connect_weights(
    policy: PolicyGroup, generation: GenerationGroup, resources: ResourcesConfig, *, waits: bool
) -> None:
    """Choose how weights travel (`actors.weight_transport`). For a broadcast, its members meet here.

    waits: the policy goes on training only after each sync has ended.
    """
    waiter, everyone = policy.waiter, [policy.actors[0], *generation.actors]

    def answers(handles: list[ray.ObjectRef], what: str) -> list:
        return waiter.get(handles, what, resources.start_timeout_s, START_REMEDY)

    what = "where policy and generation compute"
    places = answers([waiter.track(actor.place.remote(), what) for actor in everyone], what)
    policy.transport = choose_transport(resources.weight_transport, places[0], places[1:], waits=waits)
    generation.by_channel = policy.transport == "collective"
    if not generation.by_channel:
        return
    layout, dtype = answers(policy.call("weight_layout"), "the names of the policy's weights")[0]
    address = waiter.track(policy.actors[0].address.remote(), "policy rank 0 (address)")
    (where,) = answers([address], "the policy's address")
    timeout_s = resources.call_timeout_s
    meeting = policy.call("open_channel", len(everyone), *where, layout, timeout_s)
    meeting += [
        waiter.track(
            actor.open_channel.remote(rank, len(everyone), *where, layout, dtype, timeout_s),
            f"generation actor {rank - 1} (channel for weights)",
        )
        for rank, actor in enumerate(generation.actors, start=1)
    ]
    answers(meeting, "policy and generation to meet")


class AdapterOff:
    """The reference without actors of its own. The policy with its adapter off is the model that PPO started from."""

    def __init__(self, policy: PolicyGroup):
        self.policy = policy

    def logprobs(self, rollouts: Refs) -> list[ray.ObjectRef]:
        return self.policy.reference_logprobs(rollouts)


class CriticGroup(TrainerGroup):
    def values(self, rollouts: Refs) -> list[ray.ObjectRef]:
        return self._forward("values", rollouts)


class ExperienceHandle:
    def __init__(self, actor: Any, waiter: Waiter, policy_ranks: int, critic_ranks: int, group_size: int):
        self.actor, self.waiter, self.group_size = actor, waiter, group_size
        self.policy_ranks, self.critic_ranks = policy_ranks, critic_ranks

    def assemble(
        self, rollouts: Refs, scores: Refs, ref_logprobs: Refs, old_logprobs: Refs, old_values: Refs, kl_coef: float
    ) -> tuple[ray.ObjectRef, list[ray.ObjectRef], list[ray.ObjectRef]]:
        """(statistics, the policy's shards, the critic's shards)."""
        returns = 1 + self.policy_ranks + self.critic_ranks
        stats, *shards, receipt = self.actor.assemble.options(num_returns=returns + 1).remote(
            len(rollouts), kl_coef, *rollouts, *scores, *ref_logprobs, *old_logprobs, *old_values
        )
        self.waiter.track(stats, "experience", receipt)
        return stats, shards[: self.policy_ranks], shards[self.policy_ranks :]

    def own_mismatch(self, rollouts: Refs, logprobs: Refs) -> ray.ObjectRef:
        ref = self.actor.own_mismatch.remote(len(rollouts), *rollouts, *logprobs)
        return self.waiter.track(ref, "experience (mismatch)")

    def zero_variance(self, rollouts: Refs, scores: Refs) -> ray.ObjectRef:
        ref = self.actor.zero_variance.remote(len(rollouts), *rollouts, *scores)
        return self.waiter.track(ref, "experience (zero-variance groups)")

    def pack(
        self, rollouts: Refs, scores: Refs, prompts: int, chunk_size: int
    ) -> tuple[list[ray.ObjectRef], list[ray.ObjectRef]]:
        """(rollouts, scores) of `prompts` prompts, in chunks of chunk_size."""
        chunks = -(-prompts * self.group_size // chunk_size)
        call = self.actor.pack.options(num_returns=2 * chunks + 1)
        *packed, receipt = call.remote(len(rollouts), prompts, chunk_size, *rollouts, *scores)
        for ref in packed:
            self.waiter.track(ref, "experience (pack)", receipt)
        return packed[:chunks], packed[chunks:]

    def evaluate(self, rollouts: Refs, scores: Refs, ref_logprobs: Refs, judged: Refs) -> ray.ObjectRef:
        ref = self.actor.evaluate.remote(len(rollouts), *rollouts, *scores, *ref_logprobs, *judged)
        return self.waiter.track(ref, "experience (evaluation)")


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

    def wait(self, handles: Refs, what: str) -> None:
        self.waiter.wait(handles, what)

    def get(self, handles: Refs, what: str) -> list[Any]:
        return self.waiter.get(handles, what)

    @property
    def trained(self) -> list[TrainerGroup]:
        return [self.policy] if self.critic is None else [self.policy, self.critic]

    def join(self, policy_start: Path, critic_start: Path, deadline_s: float) -> None:
        """The ranks of each DeepSpeed group meet at its rank 0."""
        groups = list(zip(self.trained, (policy_start, critic_start), strict=False))  # no critic, no second
        places = [
            self.waiter.track(group.actors[0].address.remote(), f"{group.role} rank 0 (address)") for group, _ in groups
        ]
        places = self.waiter.get(places, "start of the trainers", deadline_s, START_REMEDY)
        joining = [group.call("join", start, *place) for (group, start), place in zip(groups, places, strict=True)]
        answers = self.waiter.get(joining[0], "start of the policy group", deadline_s, START_REMEDY)
        self.policy.weight_bytes = answers[0]
        for handles in joining[1:]:
            self.waiter.wait(handles, "start of the critic group", deadline_s, START_REMEDY)
