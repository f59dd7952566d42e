"""A PPO iteration on paper: seconds of each phase for large models on many GPUs, in this project's design.

A model of costs, not a measurement: FLOP (`flops`), bytes and latencies over the figures below. It answers which part stops
shrinking first when GPUs are added. What fits, and how many rows at a time, the memory plan says (`scale_plan`).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from rlhf_ray.bench.flops import Shape, Work, generation, language_forward, value_forward
from rlhf_ray.bench.scale_plan import NODE, Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """By the maker's data sheet."""

    flop_per_s: float  # bfloat16, dense
    memory_per_s: float  # bytes
    link_per_s: float = 450e9  # NVLink, one direction, bytes
    network_per_s: float = 50e9  # one 400 Gb/s card per GPU, as in DGX H100 and H200, bytes


#: NVIDIA's data sheets of H100 SXM (989 TFLOP/s, 3.35 TB/s) and H200 SXM (the same chip, 4.8 TB/s); their memory: `actors.nodes`
GPUS = {"h100": Gpu(flop_per_s=989e12, memory_per_s=3.35e12), "h200": Gpu(flop_per_s=989e12, memory_per_s=4.8e12)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What is reached of the data sheet, and what the host does. Assumptions, except where a source is named."""

    training: float = 0.4  # of peak; Llama 3 reports 0.38 to 0.43 (arXiv 2407.21783, table 4)
    forward: float = 0.5  # of peak
    decode: float = 0.7  # of the memory's bytes per second
    launch_s: float = 5e-6  # of one kernel from Python
    kernels: int = 0  # so launched in a block's decode step: none, it is a CUDA graph (engines graphs and vllm); torch's has 12
    step_s: float = 1e-3  # of the host, for a decode step: sampling, scheduling
    all_reduce_s: float = 20e-6  # of a split block, twice a step
    host_copy_per_s: float = 8e9  # between GPU and pageable memory, bytes
    pinned_per_s: float = 40e9  # and pinned memory: five eighths of the 64 GB/s of PCIe 5 x16, which each GPU has for itself
    host_adam_per_s: float = 40e9  # of a GPU's part of the host's memory (DGX H100: 614 GB/s over 8), bytes
    store_per_s: float = 4e9  # packing and putting into the object store, one process, bytes
    pull_per_s: float = 2e9  # Ray's object manager from node to node, one stream, bytes
    call_s: float = 5e-4  # of the controller, for a call: `rlhf-ray bench controller`
    assemble_token_s: float = 1e-6  # of the one experience process, for a response token: the same


@dataclass(frozen=True, slots=True)
class Iteration:
    """Seconds of the phases."""

    phases: dict[str, float]
    slower: dict[str, float]  # those that follow each other: all, or with steps ahead those of the slower side
    peak_share: float  # of all GPUs' peak over the whole iteration
    by_store: float  # seconds of the weights' way through the object store, whether they take it or not

    @property
    def seconds(self) -> float:
        return sum(self.slower.values())


def model_bytes(shape: Shape) -> float:
    """In bfloat16."""
    return 2.0 * shape.weights


def step_seconds(shape: Shape, work: Work, rows: int, split: int, gpu: Gpu, rates: Rates) -> float:
    """A decode step of `rows` rows on the `split` GPUs of a generator: as slow as memory or arithmetic, plus latencies."""
    cached = 2 * 2 * shape.layers * shape.key_value_width  # bytes per token: keys and values, bfloat16
    read = model_bytes(shape) + rows * cached * (work.prompt + work.response / 2)
    memory_s = read / (split * gpu.memory_per_s * rates.decode)
    per_row = generation(shape, work) / work.rows / (split * gpu.flop_per_s * rates.forward)
    in_a_block = rates.kernels * rates.launch_s + (2 * rates.all_reduce_s if split > 1 else 0.0)
    return max(memory_s, rows * per_row / work.response) + rates.step_s + shape.layers * in_a_block


def generate_seconds(shape: Shape, work: Work, plan: Plan, gpu: Gpu, rates: Rates) -> float:
    """Steps in waves of as many rows as the plan has a cache for."""
    rows = math.ceil(work.rows / plan.generators)
    at_once = min(rows, plan.rows)
    return math.ceil(rows / at_once) * work.response * step_seconds(shape, work, at_once, plan.split, gpu, rates)


def score_seconds(shape: Shape, work: Work, plan: Plan, gpu: Gpu, rates: Rates) -> float:
    """Four forwards: side by side, where the slowest counts, or one after the other on GPUs that all roles have."""
    language, value = language_forward(shape, work), value_forward(shape, work)
    flop = {"reward": value, "reference": language, "policy": language, "critic": value}
    each = [flop[role] / (plan.gpus[role] * gpu.flop_per_s * rates.forward) for role in flop]
    return sum(each) if plan.shares else max(each)


def update_seconds(shape: Shape, work: Work, plan: Plan, gpu: Gpu, rates: Rates) -> float:
    """The policy's with the critic's beside it, or after it on shared GPUs: arithmetic, or ZeRO-3's traffic if that takes longer.

    A microbatch gathers the weights forward and backward, 2 bytes each (`training.shards.gather_in`), and scatters the gradients in
    float32. With gradient checkpoints a block runs forward twice. An offloaded optimiser steps on the host: 28 bytes per weight of
    a rank in its memory (weight, gradient and two moments in, all but the gradient out), 8 over the bus.
    """
    ranks = plan.gpus["policy"]
    arithmetic = 4 * work.epochs * language_forward(shape, work) / (ranks * gpu.flop_per_s * rates.training)
    passes = work.epochs * max(1.0, work.rows / ranks / plan.microbatch_rows)
    traffic = passes * 4 * model_bytes(shape) * (ranks - 1) / ranks / wire(ranks, gpu)
    on_host = work.epochs * shape.weights / ranks * (28 / rates.host_adam_per_s + 8 / rates.pinned_per_s) if plan.offloads else 0.0
    return (max(arithmetic, traffic) + on_host) * (2 if plan.shares else 1)


def wire(gpus: float, gpu: Gpu) -> float:
    return gpu.link_per_s if gpus <= NODE else gpu.network_per_s


def turn_seconds(shape: Shape, plan: Plan, rates: Rates) -> float:
    """On shared GPUs: what goes over the bus, out and back, so that others have the room (`training.resting_state`): moments and
    gradients of policy and critic, 12 bytes per weight of a rank, unless they are offloaded for good; vLLM's weights."""
    if not plan.shares:
        return 0.0
    trained = 0.0 if plan.offloads else 2 * 12 * shape.weights / plan.gpus["policy"]
    return 2 * (trained + model_bytes(shape)) / rates.pinned_per_s


def sync_seconds(shape: Shape, plan: Plan, gpu: Gpu, rates: Rates) -> float:
    """By the way that the plan's places allow: one broadcast, or the object store.

    Tensor by tensor the policy's ranks gather in float32, and rank 0 sends in bfloat16 to all generators by one broadcast,
    whose time does not grow with their number (`training.weight_channel`). What is done between two tensors is not in it.
    """
    if plan.transport == "object_store":
        return store_seconds(shape, plan, gpu, rates)
    return gather_seconds(shape, plan, gpu) + send_seconds(shape, plan, gpu)


def gather_seconds(shape: Shape, plan: Plan, gpu: Gpu) -> float:
    return 2 * model_bytes(shape) / wire(plan.gpus["policy"], gpu)


def send_seconds(shape: Shape, plan: Plan, gpu: Gpu) -> float:
    return model_bytes(shape) / wire(plan.gpus["policy"] + plan.gpus["generation"], gpu)


def store_seconds(shape: Shape, plan: Plan, gpu: Gpu, rates: Rates) -> float:
    """Rank 0 gathers in float32, copies to the host, puts into the store; nodes pull, in a tree; generators copy it in. For roles
    that share GPUs."""
    size = model_bytes(shape)
    nodes = math.ceil(plan.gpus["generation"] / NODE) + (not plan.shares and plan.count > NODE)  # rank 0's, too
    pulls = math.ceil(math.log2(nodes))
    ways = [size / rates.host_copy_per_s, size / rates.store_per_s, pulls * size / rates.pull_per_s]
    return gather_seconds(shape, plan, gpu) + sum(ways) + size / plan.split / rates.host_copy_per_s


def iteration(shape: Shape, work: Work, plan: Plan, gpu: Gpu, rates: Rates) -> Iteration:
    """One PPO iteration as planned, which fits."""
    chunks = math.ceil(work.rows / plan.rows)
    phases = {
        "generate": generate_seconds(shape, work, plan, gpu, rates),
        "score": score_seconds(shape, work, plan, gpu, rates),
        "assemble": work.rows * work.response * rates.assemble_token_s,
        "update": update_seconds(shape, work, plan, gpu, rates),
        "turns": turn_seconds(shape, plan, rates),
        "sync": sync_seconds(shape, plan, gpu, rates),
        "calls": (5 * chunks + plan.generators + 3 * plan.gpus["policy"]) * rates.call_s,
    }
    slower = slower_side(shape, phases, plan, gpu, rates) if plan.ahead else phases
    language, value = language_forward(shape, work), value_forward(shape, work)
    flop = generation(shape, work) + 2 * (language + value) + 3 * work.epochs * (language + value)  # without what runs twice
    share = flop / (sum(slower.values()) * plan.count * gpu.flop_per_s)
    return Iteration(phases, slower, share, store_seconds(shape, plan, gpu, rates))


def slower_side(shape: Shape, phases: dict[str, float], plan: Plan, gpu: Gpu, rates: Rates) -> dict[str, float]:
    """Of generation and training, a step apart. Training scores, updates, and copies the weights to pinned memory, from where a
    second thread broadcasts them; generators stop for the broadcast alone."""
    bus = model_bytes(shape) / rates.pinned_per_s
    trains = {name: phases[name] for name in ("score", "assemble", "update", "calls")}
    trains["sync"] = gather_seconds(shape, plan, gpu) + bus
    draws = {"generate": phases["generate"], "sync": max(send_seconds(shape, plan, gpu), bus), "calls": phases["calls"]}
    return max(trains, draws, key=lambda side: sum(side.values()))


def evaluation_seconds(shape: Shape, work: Work, plan: Plan, gpu: Gpu, rates: Rates) -> float:
    """Of the one process that evaluates, however many GPUs there are: two models draw a step's responses, their scores and
    log-probs are told (the tuned one's by both), on one GPU."""
    drawn = 2 * math.ceil(work.rows / plan.rows) * work.response * step_seconds(shape, work, plan.rows, plan.split, gpu, rates)
    told = 2 * (language_forward(shape, work) + value_forward(shape, work)) / (gpu.flop_per_s * rates.forward)
    return drawn + told


def bend_of(found: list[tuple[int, Iteration]]) -> str:
    """Where more GPUs first help least: a phase that twice the GPUs shorten by less than a fifth, though it is the longest or takes
    an eighth of the iteration. found: (GPUs, iteration), GPUs doubling."""
    for (_, before), (count, after) in itertools.pairwise(found):
        earlier = before.phases | before.slower
        stuck = {name: seconds for name, seconds in after.slower.items() if seconds > 0.8 * earlier[name]}
        name = max(stuck, key=lambda each: stuck[each], default=None)
        if name is not None and stuck[name] >= after.seconds / 8:
            share = stuck[name] / after.seconds
            took = f"{stuck[name]:.1f} s where half of them take {earlier[name]:.1f}"
            return f"{name} first, at {count} GPUs: {took} ({share:.0%} of all)"
    return "nowhere up to here"
