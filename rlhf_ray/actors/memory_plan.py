"""What a run needs of each GPU and of each node's memory, phase by phase, against what the nodes have.   Bytes.

A phase is a supervised stage, a turn of PPO's step, or the evaluation: one ends before the next begins. What shares a GPU is added
up on that GPU.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlhf_ray.actors.layout import ActorLayout, lay_out
from rlhf_ray.actors.nodes import Node
from rlhf_ray.actors.weight_transport import planned_transport
from rlhf_ray.config import Recipe, RoleConfig
from rlhf_ray.errors import UserError
from rlhf_ray.models.evaluation_memory import evaluation_process, serving_process
from rlhf_ray.models.memory import memory_plan, snapshot_bytes, trained_by_role
from rlhf_ray.models.planned_process import CONTEXT, FORKED, GB, IMPORTED, PlannedProcess
from rlhf_ray.models.sent_weights import Transport, versions_in_store
from rlhf_ray.models.stage_memory import stage_memory_plan
from rlhf_ray.models.support_memory import support_store_bytes, support_tokens
from rlhf_ray.models.turns import turns_of

#: Parts that a process has in the host's memory because it trains.
BESIDE = ("copy for a checkpoint", "snapshot", "model to be written", "weights to send", "staged weights")


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one process takes of a GPU or of a node's memory."""

    process: str  # "policy 3", "sft 0"
    size: float
    loads: bool  # while it loads its model, and not later


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    name: str  # "ppo", "evaluation", "serving", or the supervised stage
    turn: str | None  # of PPO's step, where roles take turns on their GPUs (`models.turns`); the host's memory is the first one's
    processes: Mapping[str, PlannedProcess]  # "policy" -> one of them
    layout: ActorLayout
    gpus: Mapping[tuple[int, int], Sequence[Share]]  # (node, GPU) -> its processes
    hosts: Mapping[int, Sequence[Share]]  # node -> its processes, and what they share


@dataclass(frozen=True, slots=True, kw_only=True)
class Precisions:
    """Bytes of a number that is computed with."""

    ppo: int = 4  # of roles on CPUs
    ppo_gpu: int = 2
    evaluation: int = 4  # on a CPU; on a GPU it is PPO's
    serving: int = 4  # on a CPU; on a GPU 2
    stages: Mapping[str, int]


def phases_of(
    recipe: Recipe, nodes: Sequence[Node], precisions: Precisions, *, stages: Collection[str], forked: bool = False
) -> list[Phase]:
    """Those of the stages that are to run and that the nodes have room for: another check tells of the others.

    "evaluation" is one of them, and so is "serving": one replica of `rlhf-ray serve`. forked: the processes of PPO's actors are
    forks of one. Of what truncated sampling keeps, only what top_k bounds is counted: the bound of top_p and min_p is the
    vocabulary, and trained models are far below it.
    """
    amounts = [node.amounts for node in nodes]
    found: list[Phase] = []
    for row in stage_memory_plan(recipe, dict(precisions.stages)):
        section = recipe.trained[row.stage]
        workers = RoleConfig(actors=row.workers, cpus=section.cpus_per_worker, gpus=row.gpus)
        if row.stage in stages and (layout := _fits({"policy": workers}, amounts, "PACK")) is not None:
            found.append(_phase(row.stage, {"policy": row.process}, layout, names={"policy": row.stage}, imported=IMPORTED))
    if "ppo" in stages and (layout := _fits(recipe.ppo_roles, amounts, recipe.resources.placement)) is not None:
        support = support_tokens(recipe) if recipe.generation.top_k else 0
        way = _way_of(recipe, layout)
        rows = memory_plan(recipe, itemsize=precisions.ppo, gpu_itemsize=precisions.ppo_gpu, support=support, way=way)
        shared = {
            "object store": (_sent_bytes(recipe, precisions) if way == "object_store" else 0.0) + snapshot_bytes(recipe),
            "tokens drawn among": 2 * support_store_bytes(recipe, support),
        }
        processes = {row.role: row.process for row in rows}
        imported, once = (FORKED, IMPORTED) if forked else (IMPORTED, 0.0)
        options: dict[str, Any] = {"imported": imported, "once": once, "shared": shared}
        first, *rest = turns_of(recipe) or (None,)
        found.append(_phase("ppo", processes, layout, turn=first, **options))
        found += [replace(_phase("ppo", processes, layout, turn=turn, **options), hosts={}) for turn in rest]
    alone = {"evaluation": (recipe.resources.generation.gpus, evaluation_process, (precisions.evaluation, precisions.ppo_gpu))}
    gpu = float(any(each.get("GPU", 0.0) >= 1 for each in amounts))
    alone["serving"] = (gpu, serving_process, (precisions.serving, 2))
    for name, (gpus, process_of, itemsizes) in alone.items():
        place = {"generation": RoleConfig(actors=1, cpus=1, gpus=gpus)}
        if name in stages and (layout := _fits(place, amounts, "PACK")) is not None:
            process = process_of(recipe, on_gpu=gpus > 0, itemsize=itemsizes[gpus > 0])
            found.append(_phase(name, {"generation": process}, layout, names={"generation": name}, imported=IMPORTED))
    return found


def _way_of(recipe: Recipe, layout: ActorLayout) -> Transport:
    try:
        return planned_transport(recipe, layout)
    except UserError:  # another check tells of it
        return "object_store"


def _sent_bytes(recipe: Recipe, precisions: Precisions) -> float:
    """Of new weights in the object store."""
    itemsize = precisions.ppo_gpu if recipe.resources.generation.gpus > 0 else 4
    return float(versions_in_store(recipe) * itemsize) * trained_by_role(recipe)["policy"]


def _fits(roles: Mapping[str, RoleConfig], amounts: Sequence[Mapping[str, float]], strategy: str) -> ActorLayout | None:
    try:
        return lay_out(roles, amounts, strategy)
    except UserError:
        return None


def _phase(
    name: str,
    processes: Mapping[str, PlannedProcess],
    layout: ActorLayout,
    *,
    imported: float,
    names: Mapping[str, str] | None = None,
    turn: str | None = None,
    once: float = 0.0,
    shared: Mapping[str, float] | None = None,
) -> Phase:
    """once, shared: of a node, beside its processes."""
    gpus: dict[tuple[int, int], list[Share]] = {}
    hosts: dict[int, list[Share]] = {}
    called = names or {}
    for (role, number), seat in layout.seats.items():
        process = processes[role].of_number(number)
        words = f"{called.get(role, role)} {number}"
        there = process.gpu_in(turn)
        loads = process.on_gpu and process.loading[0] > there - 1
        for gpu in seat.gpus:
            gpus.setdefault((seat.node, gpu), []).append(Share(process=words, size=CONTEXT + there, loads=loads))
        loads = 0 < process.memory <= process.loading[1]
        hosts.setdefault(seat.node, []).append(Share(process=words, size=imported + process.memory, loads=loads))
    for beside in hosts.values():
        beside += [Share(process=words, size=size, loads=False) for words, size in (shared or {}).items() if size]
        beside += [Share(process="what all import", size=once, loads=False)] if once else []
    called_processes = {called.get(role, role): process for role, process in processes.items()}
    return Phase(name=name, turn=turn, processes=called_processes, layout=layout, gpus=gpus, hosts=hosts)


def memory_problems(recipe: Recipe, nodes: Sequence[Node], phases: Sequence[Phase]) -> list[str]:
    """What does not fit, one sentence per stage and kind of memory, with the remedy. Of PPO's turns the one that takes most."""
    problems: list[str] = []
    for name in dict.fromkeys(phase.name for phase in phases):
        turns = [phase for phase in phases if phase.name == name]
        there_are = [(phase, *each) for phase in turns for each in sorted(phase.gpus.items())]
        over = [(phase, place, shares) for phase, place, shares in there_are if _over(shares, _gpu(nodes, place))]
        if over:
            phase, place, shares = max(over, key=lambda each: _sum(each[2]))
            there = _gpu(nodes, place)
            assert there is not None
            others = _others(sum(each[0] is phase for each in over), "GPU")
            words = f"GPU {place[1]} of {nodes[place[0]].name} has {there / GB:.1f} GB" + others
            problems.append(_sentence(recipe, phase, shares, words))
        phase = turns[0]
        full = [(node, shares) for node, shares in sorted(phase.hosts.items()) if _over(shares, nodes[node].memory)]
        if full:
            node, shares = max(full, key=lambda each: _sum(each[1]))
            memory = nodes[node].memory
            assert memory is not None
            words = f"{nodes[node].name} has {memory / GB:.1f} GB of memory" + _others(len(full), "node")
            problems.append(_sentence(recipe, phase, shares, words))
    return problems


def _sum(shares: Sequence[Share]) -> float:
    return sum(share.size for share in shares)


def _over(shares: Sequence[Share], there: float | None) -> bool:
    return there is not None and _sum(shares) > there


def _gpu(nodes: Sequence[Node], place: tuple[int, int]) -> float | None:
    known = nodes[place[0]].gpu_memory
    return known[place[1]] if place[1] < len(known) else None


def _others(count: int, what: str) -> str:
    return f" ({count} {what}s like it)" if count > 1 else ""


def _sentence(recipe: Recipe, phase: Phase, shares: Sequence[Share], there: str) -> str:
    words = {"ppo": "PPO", "evaluation": "the evaluation", "serving": "a server"}
    whole, total = words.get(phase.name, f"the stage {phase.name}"), _sum(shares)
    whole += f" ({phase.turn})" if phase.turn else ""
    by_name: dict[str, list[Share]] = {}
    for share in shares:
        by_name.setdefault(_name(share, phase), []).append(share)
    name = max(by_name, key=lambda each: _sum(by_name[each]))
    largest = by_name[name][0]
    processes = [share for share in shares if _name(share, phase) in phase.processes]
    begin = f"{whole} needs about {total / GB:.1f} GB there, and {there}; "
    if name not in phase.processes:
        if largest.process == "tokens drawn among":
            most = support_tokens(recipe)
            return (
                f"{begin}most of it says which tokens each token of a response was drawn among, up to {most} of them; "
                "lower generation.top_k"
            )
        part = f"the largest part is the {largest.process}, {largest.size / GB:.1f} GB"
        return f"{begin}{part}; use a smaller model, or a larger machine"
    if largest.size < 2 * IMPORTED and len(processes) > 1:
        return f"{begin}most of it is what {len(processes)} processes take before they load a model; use fewer actors"
    process = phase.processes[name]
    on_gpu = "GPU" in there
    if largest.loads and on_gpu and phase.name != "ppo":
        weights = f"the model in float32, as it is measured on one GPU when the stage has trained, {process.loading[0] / GB:.1f} GB"
        return f"{begin}most of it is {weights}; use a smaller model, or GPUs with more memory"
    if largest.loads:
        weights = f"{process.loading[0 if on_gpu else 1] / GB:.1f} GB of weights that each {name} process loads"
        return f"{begin}most of it is {weights}; use a smaller model, fewer processes, or more nodes"
    of_turn = process.turns.get(phase.turn or "", {**process.parts, **process.split})
    parts = of_turn if process.on_gpu == on_gpu else {}
    part = max((parts if on_gpu else {**parts, **process.host, **process.moments}).items(), key=lambda each: each[1])
    words = f"the largest part is the {part[0]} of {name}, {part[1] / GB:.1f} GB in each"
    if phase.name in ("evaluation", "serving"):
        return f"{begin}{words}; {_remedy_alone(recipe, phase.name, part[0])}"
    return f"{begin}{words}; {_remedy(recipe, phase.name, name, part[0])}"


def _remedy_alone(recipe: Recipe, phase: str, part: str) -> str:
    if part in ("cache", "logits", "passing"):
        return "serve with a lower --max-cache-tokens" if phase == "serving" else "lower generation.chunk_size"
    if phase == "serving":
        return "use a smaller model, or serve its folder where there is more room"
    alone = "set resources.generation.gpus to 1" if 0 < recipe.resources.generation.gpus < 1 else "use a smaller model"
    return f"{alone}, or leave the stage out and evaluate the run's models where there is more room"


def _name(share: Share, phase: Phase) -> str:
    """Of its role or stage, or what it says itself."""
    role = share.process.rpartition(" ")[0]
    return role if role in phase.processes else share.process


def _remedy(recipe: Recipe, phase: str, role: str, part: str) -> str:
    trains = phase != "ppo" or role in ("policy", "critic")
    if not trains:
        rows = "generation.max_num_seqs, generation.chunk_size" if recipe.generation.engine == "vllm" else "generation.chunk_size"
        lower = {"cache": f"{rows} or generation.max_new_tokens", "logits": rows}
        if role == "generation" and part in lower:
            return f"lower {lower[part]}"
        if part == "received weights":
            return "set ppo.weights_in_flight to false, or resources.weight_transport to object_store"
        if part in ("weights", "copies", "sleeping weights", "copy beside the engine"):
            return "use a smaller model or fewer actors, or give it a GPU of its own"
        return "lower ppo.microbatch_size"
    where, group = (f"resources.{role}", recipe.resources.roles[role]) if phase == "ppo" else (phase, recipe.trained[phase])
    section, train = ("ppo", recipe.ppo) if phase == "ppo" else (phase, recipe.trained[phase])
    stage = vars(group)["zero_stage"]
    if part in ("weights", "gradients", "optimiser", "gathered", "buckets", "copies", "shared weights"):
        ways = [f"set {where}.zero_stage to 3 with more ranks"] if stage < 3 else []
        ways += [] if vars(group)["offload_optimizer"] else [f"set {where}.offload_optimizer to true"]
        return ", ".join([*ways, f"set {section}.lora" if role != "critic" else "set ppo.critic_lora", "or use a smaller model"])
    adapters = "set ppo.critic_lora" if role == "critic" else f"set {section}.lora"
    if part in ("resting moments", "resting gradients"):
        return f"set {where}.zero_stage to 3 with more ranks, {adapters}, or use a smaller model"
    if part in BESIDE:
        ranks = f"{where}.actors" if phase == "ppo" else f"{where}.workers"
        return f"raise {ranks}, over nodes, {adapters}, or use a smaller model"
    ways = [f"lower {section}.microbatch_size"]
    if phase != "ppo":
        ways[0] += f" or {section}.max_length"
    if part != "logits" and not train.gradient_checkpointing:
        ways.append(f"set {section}.gradient_checkpointing to true")
    if phase == "ppo" and recipe.ppo.reuse_forward:
        ways.append("set ppo.reuse_forward to false")
    return ", or ".join(ways)
