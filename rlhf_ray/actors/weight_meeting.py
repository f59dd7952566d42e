"""Policy and generation agree on how weights travel."""

from __future__ import annotations

from rlhf_ray.actors.calls import Handle
from rlhf_ray.actors.groups import GenerationGroup, PolicyGroup
from rlhf_ray.actors.wait import START_REMEDY, Waiter
from rlhf_ray.actors.weight_transport import choose_transport
from rlhf_ray.config import ResourcesConfig


def connect_weights(
    policy: PolicyGroup, generation: GenerationGroup, waiter: Waiter, resources: ResourcesConfig, *, waits: bool
) -> None:
    """Choose how weights travel (`actors.weight_transport`). For a broadcast, its members meet here.

    waits: the policy goes on training only after each sync has ended. Otherwise it sends a copy of its weights.
    """
    everyone = [policy.members[0], *generation.members]

    def answers(handles: list[Handle], what: str) -> list:
        return waiter.get(handles, what, resources.start_timeout_s, START_REMEDY)

    what = "where policy and generation compute"
    places = answers([handle for member in everyone for handle in member.call("place", name=what)], what)
    policy.transport = choose_transport(resources.weight_transport, places[0], places[1:], waits=waits)
    generation.by_channel = policy.transport == "collective"
    policy.stages = generation.by_channel and not waits
    generation.staged_by = policy if policy.stages else None
    if not generation.by_channel:
        return
    for member in generation.members:
        # With generation ahead of training one of them may still draw while another waits.
        member.peers = [*(generation.members if policy.stages else [member]), *policy.members]
    layout, dtype = answers(policy.call("weight_layout"), "the names of the policy's weights")[0]
    address = policy.members[0].call("address", name="policy rank 0 (address)")
    (where,) = answers(address, "the policy's address")
    timeout_s = resources.call_timeout_s
    meeting = policy.call("open_channel", len(everyone), *where, layout, timeout_s, policy.stages)
    for rank, member in enumerate(generation.members, start=1):
        place = rank, len(everyone), *where, layout, dtype, timeout_s
        meeting += member.call("open_channel", *place, name=f"{member.name} (channel for weights)")
    answers(meeting, "policy and generation to meet")
