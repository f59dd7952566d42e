"""Where the PPO roles go: one placement group with a bundle for each actor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlhf_ray.actors.wait import START_REMEDY, Waiter
from rlhf_ray.config import RoleConfig
from rlhf_ray.config.threads import ALONE_ENVIRONMENT
from rlhf_ray.errors import UserError

Roles = Mapping[str, RoleConfig]
Amounts = Mapping[str, float]  # "CPU", "GPU"; a node has other kinds beside them


def nodes_alive() -> list[Amounts]:
    """What each node of the cluster has, in use or not."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def altogether(amounts: Sequence[Amounts]) -> dict[str, float]:
    return {kind: round(sum(each.get(kind, 0.0) for each in amounts), 6) for kind in ("CPU", "GPU")}


def bundle_of(role: RoleConfig) -> dict[str, float]:
    """What each actor of the role reserves."""
    # Ray refuses an empty bundle; a hundredth of a CPU reserves nothing that counts.
    return {kind: value for kind, value in (("CPU", role.cpus), ("GPU", role.gpus)) if value > 0} or {"CPU": 0.01}


def check_fits(roles: Roles, nodes: Sequence[Amounts], strategy: str) -> None:
    """UserError for what these nodes could not hold even if nothing else ran on them."""
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
        if not any(_holds(node, bundle) for node in nodes):
            raise UserError(
                f"a {name} actor needs {_in_words(bundle)}, and none of the {len(nodes)} nodes has that; "
                f"lower resources.{name}.cpus or resources.{name}.gpus, or add a larger node"
            )
    if strategy == "STRICT_PACK" and not any(_holds(node, together) for node in nodes):
        raise UserError(
            f"resources.placement is STRICT_PACK, so one node has to hold all actors, {_in_words(together)}, and none "
            f"of the {len(nodes)} does; set it to PACK, or lower resources.*.actors"
        )
    usable = sum(any(_holds(node, bundle) for bundle in needed_by.values()) for node in nodes)
    if strategy == "STRICT_SPREAD" and usable < len(bundles):
        raise UserError(
            f"resources.placement is STRICT_SPREAD, so each of the {len(bundles)} actors needs a node of its own, and "
            f"the cluster has {usable}; set it to SPREAD, lower resources.*.actors, or add nodes"
        )


def _holds(node: Amounts, bundle: Amounts) -> bool:
    return all(value <= node.get(kind, 0.0) for kind, value in bundle.items())


def _in_words(amounts: Amounts) -> str:
    return " and ".join(f"{value:g} {kind}s" for kind, value in amounts.items() if value > 0)


class Placement:
    """Reserves the bundles and hands out actor options, role by role. A context manager: leaving it frees them."""

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
        self.alone, self.runtime_env = alone, dict(runtime_env or {})
        check_fits(roles, nodes_alive(), strategy)
        self._bundles: list[dict[str, float]] = []
        self._first: dict[str, int] = {}
        for name, role in roles.items():
            self._first[name] = len(self._bundles)
            self._bundles += [bundle_of(role)] * role.actors
        self.group: PlacementGroup = placement_group(self._bundles, strategy=strategy)
        ready = waiter.track(self.group.ready(), f"placement group of {len(self._bundles)} bundles")
        waiter.wait([ready], "resources", timeout_s, START_REMEDY)

    def options(self, role: str, number: int) -> dict:
        index = self._first[role] + number
        bundle = self._bundles[index]
        alone = {"env_vars": ALONE_ENVIRONMENT} if role == self.alone else {}
        return {
            "runtime_env": self.runtime_env or alone,
            "num_cpus": bundle.get("CPU", 0),
            "num_gpus": bundle.get("GPU", 0),
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=index),
        }

    def __enter__(self) -> Placement:
        return self

    def __exit__(self, *exc) -> None:
        remove_placement_group(self.group)
