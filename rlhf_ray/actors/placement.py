"""Where the PPO roles go: one placement group with a bundle for each actor."""

from __future__ import annotations

from collections.abc import Mapping

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlhf_ray.actors.wait import Waiter
from rlhf_ray.config import RoleConfig
from rlhf_ray.errors import UserError

Roles = Mapping[str, RoleConfig]


def needs(roles: Roles) -> dict[str, float]:
    """CPUs and GPUs of all actors together."""
    return {
        "CPU": round(sum(role.actors * role.cpus for role in roles.values()), 6),
        "GPU": round(sum(role.actors * role.gpus for role in roles.values()), 6),
    }


def check_fits(roles: Roles, cluster: Mapping[str, float]) -> None:
    """UserError if the cluster is too small altogether."""
    for kind, needed in needs(roles).items():
        there = cluster.get(kind, 0.0)
        if needed > there:
            parts = ", ".join(
                f"{name} {role.actors} x {role.cpus if kind == 'CPU' else role.gpus:g}" for name, role in roles.items()
            )
            raise UserError(
                f"the roles need {needed:g} {kind}s ({parts}), the cluster has {there:g}; "
                f"lower resources.*.{kind.lower()}s or resources.*.actors, or add nodes"
            )


class Placement:
    """Reserves the bundles and hands out actor options, role by role. A context manager: leaving it frees them."""

    def __init__(self, roles: Roles, waiter: Waiter, *, strategy: str, timeout_s: float):
        check_fits(roles, ray.cluster_resources())
        self._bundles: list[dict[str, float]] = []
        self._first: dict[str, int] = {}
        for name, role in roles.items():
            self._first[name] = len(self._bundles)
            # Ray refuses an empty bundle; a hundredth of a CPU reserves nothing that counts.
            bundle = {kind: value for kind, value in (("CPU", role.cpus), ("GPU", role.gpus)) if value > 0} or {
                "CPU": 0.01
            }
            self._bundles += [bundle] * role.actors
        self.group: PlacementGroup = placement_group(self._bundles, strategy=strategy)
        ready = waiter.track(self.group.ready(), f"placement group of {len(self._bundles)} bundles")
        waiter.wait([ready], "resources", timeout_s)

    def options(self, role: str, number: int) -> dict:
        index = self._first[role] + number
        bundle = self._bundles[index]
        return {
            "num_cpus": bundle.get("CPU", 0),
            "num_gpus": bundle.get("GPU", 0),
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=index),
        }

    def __enter__(self) -> Placement:
        return self

    def __exit__(self, *exc) -> None:
        remove_placement_group(self.group)
