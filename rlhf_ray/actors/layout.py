"""Which actors stand on which node and GPU, on paper: from the recipe's roles and the nodes' amounts. No Ray.

A slot is what one placement-group bundle reserves: an actor, and those that share its GPU by name. Trainers are placed first, the
ranks of a group together on a node where one holds them, then the other roles where the least is left.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rlhf_ray.config import RoleConfig
from rlhf_ray.config.resource_sections import TRAINERS
from rlhf_ray.errors import UserError

Roles = Mapping[str, RoleConfig]
Amounts = Mapping[str, float]  # "CPU", "GPU"; a node has other kinds beside them
Actor = tuple[str, int]  # role, number
KINDS = ("GPU", "CPU")
ROUNDING = 1e-6


@dataclass(frozen=True, slots=True)
class Slot:
    """What one bundle reserves, and for which actors."""

    actors: tuple[Actor, ...]
    bundle: Mapping[str, float]

    @property
    def role(self) -> str:
        """The role of the first, which the others share a GPU with."""
        return self.actors[0][0]


@dataclass(frozen=True, slots=True)
class Seat:
    """Where an actor stands."""

    node: int  # in the order of the nodes given
    gpus: tuple[int, ...]  # of that node; (): it computes on CPUs


@dataclass(frozen=True, slots=True)
class ActorLayout:
    blocks: tuple[tuple[int, tuple[Slot, ...]], ...]  # (node, its slots), the largest first
    seats: Mapping[Actor, Seat]

    def nodes_of(self, role: str) -> list[int]:
        """Of each of its actors, in order."""
        return [seat.node for (name, _), seat in sorted(self.seats.items()) if name == role]


def bundle_of(role: RoleConfig) -> dict[str, float]:
    """What each actor of the role reserves by itself."""
    # Ray refuses an empty bundle; a hundredth of a CPU reserves nothing that counts.
    return {kind: value for kind, value in (("CPU", role.cpus), ("GPU", role.gpus)) if value > 0} or {"CPU": 0.01}


def slots_of(roles: Roles) -> list[Slot]:
    """Roles that share by name have the whole of their GPU: no other bundle may get the rest of it."""
    slots: list[Slot] = []
    for name in roles:
        if roles[name].host is not None:
            continue
        guests = [other for other in roles if roles[other].host == name]
        for number in range(roles[name].actors):
            there = [(name, number), *((guest, number) for guest in guests if number < roles[guest].actors)]
            bundle = bundle_of(roles[name])
            if guests:
                bundle = {"CPU": round(sum(roles[role].cpus for role, _ in there), 6) or 0.01, "GPU": 1.0}
            slots.append(Slot(tuple(there), bundle))
    return slots


def lay_out(roles: Roles, nodes: Sequence[Amounts], strategy: str) -> ActorLayout:
    """UserError where the nodes, with nothing else on them, can't hold the slots."""
    slots = slots_of(roles)
    if strategy in ("SPREAD", "STRICT_SPREAD"):
        return _seated(_spread(slots, nodes, strict=strategy == "STRICT_SPREAD"))
    if strategy == "STRICT_PACK":
        return _seated(_packed([slots], nodes, together=True))
    units = list(_units(slots))
    try:
        return _seated(_packed(units, nodes, together=False))
    except UserError:  # another order may fit
        return _seated(_packed(sorted(units, key=_size, reverse=True), nodes, together=False))


def _units(slots: Sequence[Slot]) -> Iterator[list[Slot]]:
    """The ranks of a group stay together as far as they can; others go one by one."""
    for trainer in TRAINERS:
        group = [slot for slot in slots if slot.role == trainer]
        if group:
            yield group
    yield from ([slot] for slot in slots if slot.role not in TRAINERS)


def _size(unit: Sequence[Slot]) -> tuple[float, ...]:
    return tuple(sum(slot.bundle.get(kind, 0.0) for slot in unit) for kind in KINDS)


def _packed(units: Sequence[Sequence[Slot]], nodes: Sequence[Amounts], *, together: bool) -> list[tuple[int, Slot]]:
    """together: a unit is never divided."""
    free = [{kind: node.get(kind, 0.0) for kind in KINDS} for node in nodes]
    placed: list[tuple[int, Slot]] = []
    used: set[int] = set()

    def best(needed: Amounts) -> int | None:
        """The node where the least is left of what holds it: those in use first, and none with GPUs for what needs none."""
        fitting = [number for number, amounts in enumerate(free) if holds(amounts, needed)]
        return min(
            fitting,
            key=lambda number: (
                not needed.get("GPU") and free[number]["GPU"] > 0 and number not in used,
                number not in used and not needed.get("GPU"),
                *(free[number][kind] for kind in KINDS),
                number,
            ),
            default=None,
        )

    def put(node: int, slot: Slot) -> None:
        used.add(node)
        placed.append((node, slot))
        for kind, value in slot.bundle.items():
            free[node][kind] = round(free[node][kind] - value, 6)

    for unit in units:
        needed: dict[str, float] = dict(zip(KINDS, _size(unit), strict=True))
        node = best(needed)
        if node is not None:
            for slot in unit:
                put(node, slot)
            continue
        left = [] if together else list(unit)
        while left:  # as many on one node as it holds, then on the next
            node = max(range(len(free)), key=lambda number: (_how_many(free[number], left), -number), default=0)
            count = _how_many(free[node], left) if free else 0
            if count == 0:
                raise UserError(_no_room(left[0], free))
            for slot in left[:count]:
                put(node, slot)
            left = left[count:]
        if together:
            raise UserError(_no_room(unit[0], free))
    return placed


def _how_many(amounts: Amounts, slots: Sequence[Slot]) -> int:
    """How many of the slots, in order, the node holds."""
    needed = dict.fromkeys(KINDS, 0.0)
    for count, slot in enumerate(slots):
        needed = {kind: needed[kind] + slot.bundle.get(kind, 0.0) for kind in KINDS}
        if not holds(amounts, needed):
            return count
    return len(slots)


def _spread(slots: Sequence[Slot], nodes: Sequence[Amounts], *, strict: bool) -> list[tuple[int, Slot]]:
    """Each on the node that has the fewest so far."""
    free = [{kind: node.get(kind, 0.0) for kind in KINDS} for node in nodes]
    counts = [0] * len(nodes)
    placed: list[tuple[int, Slot]] = []
    for slot in slots:
        fitting = [number for number in range(len(nodes)) if holds(free[number], slot.bundle) and not (strict and counts[number])]
        if not fitting:
            raise UserError(_no_room(slot, free))
        node = min(fitting, key=lambda number: (counts[number], number))
        placed.append((node, slot))
        counts[node] += 1
        for kind, value in slot.bundle.items():
            free[node][kind] = round(free[node][kind] - value, 6)
    return placed


def _seated(placed: Sequence[tuple[int, Slot]]) -> ActorLayout:
    by_node: dict[int, list[Slot]] = {}
    for node, slot in placed:
        by_node.setdefault(node, []).append(slot)
    seats: dict[Actor, Seat] = {}
    for node, slots in by_node.items():
        taken: list[float] = []  # of each GPU of the node
        for slot in slots:
            gpus = _gpus(taken, slot.bundle.get("GPU", 0.0))
            seats |= {actor: Seat(node, gpus) for actor in slot.actors}
    blocks = sorted(((node, tuple(slots)) for node, slots in by_node.items()), key=lambda block: _size(block[1]), reverse=True)
    return ActorLayout(tuple(blocks), seats)


def _gpus(taken: list[float], needed: float) -> tuple[int, ...]:
    """The GPUs that Ray would give: whole ones, or for a share the one that has the least left for it."""
    if needed <= 0:
        return ()
    if needed < 1:
        fitting = [number for number, share in enumerate(taken) if 0 < share <= 1 - needed + ROUNDING]
        if fitting:
            number = max(fitting, key=lambda each: (taken[each], -each))
            taken[number] = round(taken[number] + needed, 6)
            return (number,)
        taken.append(needed)
        return (len(taken) - 1,)
    first = len(taken)
    taken += [1.0] * round(needed)
    return tuple(range(first, len(taken)))


def holds(node: Amounts, bundle: Amounts) -> bool:
    return all(value <= node.get(kind, 0.0) + ROUNDING for kind, value in bundle.items())


def in_words(amounts: Amounts) -> str:
    return " and ".join(f"{value:g} {kind}s" for kind, value in amounts.items() if value > 0)


def _no_room(slot: Slot, free: Sequence[Amounts]) -> str:
    left = "; ".join(in_words(amounts) or "nothing" for amounts in free)
    actor = f"{slot.role} actor {slot.actors[0][1]}"
    return (
        f"the nodes together would do, but no one of them has room for {actor}, which needs {in_words(slot.bundle)}: beside the "
        f"others they have {left} left; change resources.*.actors, cpus or gpus so that they fill the nodes"
    )


def layout_words(roles: Roles, layout: ActorLayout) -> list[str]:
    """What is worth a warning: groups over several nodes."""
    words = []
    for role in TRAINERS:
        nodes = layout.nodes_of(role) if role in roles else []
        if len(set(nodes)) > 1 and roles[role].actors > 1:
            counts = " + ".join(str(nodes.count(node)) for node in sorted(set(nodes)))
            spread = f"the {len(nodes)} ranks of {role} stand on {len(set(nodes))} nodes ({counts})"
            words.append(f"{spread}: their traffic takes the network")
    return words
