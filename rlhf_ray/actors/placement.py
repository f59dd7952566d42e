"""Where the PPO roles go: placement groups of Ray, with a bundle for each slot of the layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlhf_ray.actors.layout import Actor, ActorLayout, Amounts, Roles, Slot, bundle_of, holds, in_words, lay_out
from rlhf_ray.actors.wait import START_REMEDY, Waiter
from rlhf_ray.config.threads import ALONE_ENVIRONMENT
from rlhf_ray.errors import UserError


def nodes_alive() -> list[Amounts]:
    """What each node of the cluster has, in use or not."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def altogether(amounts: Sequence[Amounts]) -> dict[str, float]:
    return {kind: round(sum(each.get(kind, 0.0) for each in amounts), 6) for kind in ("CPU", "GPU")}


def check_fits(roles: Roles, nodes: Sequence[Amounts], strategy: str) -> ActorLayout:
    """Where they would stand; UserError for what these nodes could not hold even if nothing else ran on them."""
    needed_by, cluster = {name: bundle_of(role) for name, role in roles.items()}, altogether(nodes)
    bundles = [needed_by[name] for name, role in roles.items() for _ in range(role.actors)]
    together = altogether(bundles)
    for kind, needed in together.items():
        there = cluster[kind]
        if needed > there:
            parts = ", ".join(
                f"{name} {role.actors} x {role.cpus if kind == 'CPU' else role.gpus:g}" for name, role in roles.items()
            )
            raise UserError(
                f"the roles need {needed:g} {kind}s ({parts}), the cluster has {there:g}; "
                f"lower resources.*.{kind.lower()}s or resources.*.actors, or add nodes"
            )
    for name, bundle in needed_by.items():
        if not any(holds(node, bundle) for node in nodes):
            raise UserError(
                f"a {name} actor needs {in_words(bundle)}, and none of the {len(nodes)} nodes has that; "
                f"lower resources.{name}.cpus or resources.{name}.gpus, or add a larger node"
            )
    if strategy == "STRICT_PACK" and not any(holds(node, together) for node in nodes):
        raise UserError(
            f"resources.placement is STRICT_PACK, so one node has to hold all actors, {in_words(together)}, and none "
            f"of the {len(nodes)} does; set it to PACK, or lower resources.*.actors"
        )
    usable = sum(any(holds(node, bundle) for bundle in needed_by.values()) for node in nodes)
    if strategy == "STRICT_SPREAD" and usable < len(bundles):
        raise UserError(
            f"resources.placement is STRICT_SPREAD, so each of the {len(bundles)} actors needs a node of its own, and "
            f"the cluster has {usable}; set it to SPREAD, lower resources.*.actors, or add nodes"
        )
    return lay_out(roles, nodes, strategy)


class Placement:
    """Reserves the bundles and hands out actor options, role by role. A context manager: leaving it frees them.

    PACK: the slots that the layout puts on one node are one placement group, which Ray keeps on one node, also when it has to
    move it. Groups are asked for from the largest to the smallest.
    """

    def __init__(
        self,
        roles: Roles,
        waiter: Waiter,
        *,
        strategy: str,
        timeout_s: float,
        alone: str | None = "generation",
        runtime_env: Mapping[str, Any] | None = None,
    ):
        """alone: the role that works while all others wait. runtime_env: of all actors, the variables of `alone` included."""
        self.alone, self.runtime_env, self.roles = alone, dict(runtime_env or {}), roles
        self.layout = check_fits(roles, nodes_alive(), strategy)
        self.groups: list[PlacementGroup] = []
        self._places: dict[Actor, tuple[PlacementGroup, int]] = {}
        spreads = strategy in ("SPREAD", "STRICT_SPREAD")
        blocks: list[Sequence[Slot]] = [slots for _, slots in self.layout.blocks]
        if spreads:
            blocks = [[slot for slots in blocks for slot in slots]]
        try:
            for slots in blocks:
                group = placement_group([dict(slot.bundle) for slot in slots], strategy=strategy if spreads else "STRICT_PACK")
                self.groups.append(group)
                self._places |= {actor: (group, index) for index, slot in enumerate(slots) for actor in slot.actors}
            bundles = sum(len(slots) for slots in blocks)
            ready = [waiter.track(group.ready(), f"placement group of {bundles} bundles") for group in self.groups]
            waiter.wait(ready, "resources", timeout_s, START_REMEDY)
        except BaseException:  # fault boundary: the reservation; whatever ended it goes on, and nothing stays reserved
            self._free()
            raise

    def options(self, role: str, number: int) -> dict:
        group, index = self._places[role, number]
        bundle = bundle_of(self.roles[role])
        alone = {"env_vars": ALONE_ENVIRONMENT} if role == self.alone else {}
        return {
            "runtime_env": self.runtime_env or alone,
            "num_cpus": bundle.get("CPU", 0),
            "num_gpus": bundle.get("GPU", 0),
            "scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index),
        }

    def _free(self) -> None:
        for group in self.groups:
            remove_placement_group(group)

    def __enter__(self) -> Placement:
        return self

    def __exit__(self, *exc) -> None:
        self._free()
