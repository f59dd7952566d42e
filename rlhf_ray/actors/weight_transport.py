"""How new weights get from the policy's rank 0 to the generation actors, and both ends of the way.

- object_store: numpy arrays through Ray's object store; everywhere.
- collective: one broadcast (`training.weight_channel`), each on a GPU of its own, or all on CPUs. With generation ahead of training
  the policy copies its weights to pinned memory of the host, trains on, and a second thread broadcasts the copy.
- ipc: handles of one GPU's memory, which policy and generation share (`models.shared_gpu`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rlhf_ray.actors.receipt import CallReceipt, with_receipt
from rlhf_ray.errors import UserError
from rlhf_ray.models.sent_weights import Transport

if TYPE_CHECKING:
    from rlhf_ray.actors.layout import Actor, ActorLayout
    from rlhf_ray.config import GroupConfig, Recipe
    from rlhf_ray.models.wire import Weight
    from rlhf_ray.roles.generator import Generator
    from rlhf_ray.roles.policy_trainer import PolicyTrainer
    from rlhf_ray.training.staged_weights import StagedWeights
    from rlhf_ray.training.weight_channel import Layout, WeightChannel


@dataclass(frozen=True, slots=True)
class Place:
    """The device that an actor computes on."""

    node: str
    gpu: str | None  # its id, the same in all processes; None: the CPU


def choose_transport(setting: str, policy: Place, generators: Sequence[Place], *, waits: bool) -> Transport:
    """The way that the recipe's `setting` asks for. waits: the policy leaves its weights alone until all have taken them.

    Raises UserError for a way that these places don't allow.
    """
    places = [policy, *generators]
    on_gpus = all(place.gpu is not None for place in places)
    on_cpus = all(place.gpu is None for place in places)
    possible: list[Transport] = ["object_store"]
    if on_cpus or (on_gpus and len({place.gpu for place in places}) == len(places)):
        possible.insert(0, "collective")
    if waits and on_gpus and len(set(places)) == 1:
        possible.insert(0, "ipc")
    if setting == "auto":
        return possible[0] if on_gpus else "object_store"
    chosen: Transport | None = next((way for way in possible if way == setting), None)
    if chosen is None:
        devices = ", ".join(sorted({place.gpu or "the CPU" for place in places}))
        raise UserError(
            f"resources.weight_transport is {setting}, but policy and generation compute on {devices}, which allows "
            f"{' or '.join(possible)}; set it to auto"
        )
    return chosen


def planned_transport(recipe: Recipe, layout: ActorLayout) -> Transport:
    """The way between places where nobody stands yet."""

    def place(actor: Actor) -> Place:
        seat = layout.seats[actor]
        return Place(node=str(seat.node), gpu=f"GPU {seat.gpus[0]} of node {seat.node}" if seat.gpus else None)

    generators = [place(actor) for actor in sorted(layout.seats) if actor[0] == "generation"]
    waits = recipe.ppo.steps_ahead == 0
    return choose_transport(recipe.resources.weight_transport, place(("policy", 0)), generators, waits=waits)


class PolicyEnd:
    """The policy actor's end. Every rank makes these calls, because ZeRO-3 gathers from all; rank 0 sends."""

    channel: WeightChannel | None = None
    staged: StagedWeights | None = None

    # Of the actor that this is a part of:
    recipe: Recipe
    settings: GroupConfig
    device: torch.device
    dtype: torch.dtype
    rank: int
    role: PolicyTrainer

    def weight_dtype(self) -> torch.dtype:
        """A generator that was asked to compute in float32 gets float32."""
        return torch.float32 if self.recipe.generation.precision == "float32" else self.dtype

    def check_weights(self) -> None:
        """Before any is sent: a generator that has some of the new weights can't go back to the old ones."""
        self.role.engine.check_weights("the policy's weights are not sent to the generators")

    def weight_layout(self) -> tuple[Layout, torch.dtype]:
        return [(name, tuple(tensor.shape)) for name, tensor in self.role.weights()], self.weight_dtype()

    @with_receipt
    def weights(self, parts: int):
        """The trained weights, in `parts` dicts of about equal size: name -> array (bfloat16 as its bits in int16)."""
        from rlhf_ray.models.wire import pack_weights

        self.check_weights()
        # Ray copies what a call returns into its store before this actor's next call, but ZeRO-3 takes the weights back at once.
        copy = self.settings.zero_stage == 3
        return pack_weights(self.role.weights(), parts, self.weight_dtype(), keep=self.rank == 0, copy=copy)

    @with_receipt
    def shared_weights(self, parts: int):
        """The same, as handles of this GPU's memory, which stays as it is until the next call."""
        from rlhf_ray.models.shared_gpu import share_weights

        self.check_weights()
        mine = ((name, tensor) for name, tensor in self.role.weights() if self.rank == 0)
        self.kept, handles = share_weights(mine, self.weight_dtype())
        return [handles, *({} for _ in range(parts - 1))]

    def open_channel(self, size: int, address: str, port: int, layout: Layout, timeout_s: float, staged: bool) -> None:
        """staged: weights are sent by `stage_weights` and `send_staged`, else by `send_weights`."""
        from rlhf_ray.training.staged_weights import StagedWeights
        from rlhf_ray.training.weight_channel import WeightChannel

        self.layout = layout
        if self.rank == 0:
            self.channel = WeightChannel(
                rank=0, size=size, address=address, port=port, device=self.device, timeout_s=timeout_s
            )
            if staged:
                self.staged = StagedWeights(layout, self.weight_dtype(), pinned=self.device.type == "cuda")

    def send_weights(self) -> tuple[None, CallReceipt]:
        """Send the trained weights to all members of the channel."""
        started, sent = time.perf_counter(), 0
        self.check_weights()
        if self.channel is not None:
            sent = self.channel.send(self.role.weights(), self.layout, self.weight_dtype())
        else:
            self._gather()
        return None, CallReceipt(time.perf_counter() - started, sent)

    @with_receipt
    def stage_weights(self) -> None:
        """Copy the trained weights to where `send_staged` takes them. Training may go on then."""
        self.check_weights()
        if self.staged is not None and self.channel is not None:
            self.staged.fill(self.role.weights(), self.channel.timeout_s)
        else:
            self._gather()

    def send_staged(self, staged: None) -> tuple[None, CallReceipt]:
        """To all members of the channel, in a thread of its own. staged: what `stage_weights` returned, which comes before."""
        assert self.channel is not None and self.staged is not None, "open_channel comes first"
        started = time.perf_counter()
        return None, CallReceipt(time.perf_counter() - started, self.channel.send_staged(self.staged))

    def _gather(self) -> None:
        for _ in self.role.weights():
            pass  # rank 0 gathers with us


class GenerationEnd:
    """The generation actor's end."""

    channel: WeightChannel | None = None

    # Of the actor that this is a part of:
    device: torch.device
    shares_gpu: bool
    role: Generator

    def load_weights(self, policy_version: int, *parts: Mapping[str, Weight]) -> int:
        """parts: name -> weight. Together they are all trained weights. They are copied in place, before the next chunk."""
        weights = parts[0] if len(parts) == 1 else {name: weight for part in parts for name, weight in part.items()}
        version = self.role.load_weights(weights, policy_version)
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # the policy may overwrite what it shared once this returns
        if self.shares_gpu:
            torch.cuda.empty_cache()
        return version

    def update_weights_in_flight(self, policy_version: int, *parts: Mapping[str, Weight]) -> int:
        """Like `load_weights`, while the generator draws: it copies the weights in between two chunks."""
        weights = {name: weight for part in parts for name, weight in part.items()}
        return self.role.update_weights_in_flight(weights, policy_version)

    def open_channel(
        self, rank: int, size: int, address: str, port: int, layout: Layout, dtype: torch.dtype, timeout_s: float
    ) -> None:
        from rlhf_ray.training.weight_channel import WeightChannel

        self.layout, self.sent_as = layout, dtype
        self.channel = WeightChannel(
            rank=rank, size=size, address=address, port=port, device=self.device, timeout_s=timeout_s
        )

    def receive_weights(self, policy_version: int) -> int:
        """Like `load_weights`, from the channel."""
        assert self.channel is not None, "open_channel comes first"
        from rlhf_ray.models.wire import WeightsInTurn

        coming = self.channel.receive(self.layout, self.sent_as)
        return self.load_weights(policy_version, WeightsInTurn(dict(self.layout), coming))

    def receive_weights_in_flight(self, policy_version: int) -> int:
        """Like `receive_weights`, while the generator draws: into the host's memory, and from there between two chunks."""
        from rlhf_ray.models.wire import to_host

        assert self.channel is not None, "open_channel comes first"
        with self.channel.aside():
            received = self.channel.receive(self.layout, self.sent_as)
            weights = {name: to_host(tensor, self.sent_as, copy=False) for name, tensor in received}
        return self.role.update_weights_in_flight(weights, policy_version)
