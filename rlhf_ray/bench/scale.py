"""A PPO iteration on paper: seconds of each phase for large models on many GPUs, in this project's design.

A model of costs, not a measurement: FLOP (`flops`), bytes and latencies over the figures below. It answers which part stops
shrinking first when GPUs are added.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from rlhf_ray.bench.flops import Shape, Work, generation, language_forward, value_forward
from rlhf_ray.models.activations import cast_bytes, kept_bytes
from rlhf_ray.models.held_weights import HeldWeights
from rlhf_ray.models.planned_process import CONTEXT
from rlhf_ray.models.size import ModelShape
from rlhf_ray.models.training_state import buffer_bytes, model_state


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """By the maker's data sheet."""

    flop_per_s: float  # bfloat16, dense
    memory: float  # bytes
    memory_per_s: float  # bytes
    link_per_s: float = 450e9  # NVLink, one direction, bytes
    network_per_s: float = 50e9  # one 400 Gb/s card per GPU, as in DGX H100 and H200, bytes


#: NVIDIA's data sheets of H100 SXM (989 TFLOP/s, 80 GB, 3.35 TB/s) and H200 SXM (the same chip, 141 GB, 4.8 TB/s)
GPUS = {
    "h100": Gpu(flop_per_s=989e12, memory=80e9, memory_per_s=3.35e12),
    "h200": Gpu(flop_per_s=989e12, memory=141e9, memory_per_s=4.8e12),
}
#: Llama 2's (Touvron et al. 2023, arXiv 2307.09288)
MODELS = {
    "7B": Shape(layers=32, width=4096, heads=32, vocabulary=32000, feed_forward=11008, gated=True),
    "70B": Shape(layers=80, width=8192, heads=64, key_value_heads=8, vocabulary=32000, feed_forward=28672, gated=True),
}
NODE = 8  # GPUs
#: of the GPUs; whole ones on a single node
SHARES = {"generation": 2 / 8, "policy": 2 / 8, "critic": 2 / 8, "reward": 1 / 8, "reference": 1 / 8}


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
    store_per_s: float = 4e9  # packing and putting into the object store, one process, bytes
    pull_per_s: float = 2e9  # Ray's object manager from node to node, one stream, bytes
    call_s: float = 5e-4  # of the controller, for a call: `rlhf-ray bench controller`
    assemble_token_s: float = 1e-6  # of the one experience process, for a response token: the same
    microbatch_tokens: int = 16384  # of a rank's forward pass


@dataclass(frozen=True, slots=True)
class Iteration:
    """Seconds of the phases; `misfit` says why there are none."""

    phases: dict[str, float]
    misfit: str
    split: int | None  # GPUs that hold one generator together
    peak_share: float  # of all GPUs' peak over the whole iteration
    by_store: float  # seconds of the weights' way through the object store, where they don't go by collective

    @property
    def seconds(self) -> float:
        return sum(self.phases.values())


def model_bytes(shape: Shape) -> float:
    """In bfloat16."""
    return 2.0 * shape.weights


def split_of(shape: Shape, gpu: Gpu) -> int | None:
    """GPUs that hold one generator: 1, 2, 4 or 8, so that the cache has four tenths of their memory."""
    return next((size for size in (1, 2, 4, 8) if model_bytes(shape) <= 0.6 * gpu.memory * size), None)


def generate_seconds(shape: Shape, work: Work, gpus: float, gpu: Gpu, rates: Rates) -> float:
    """Decode steps in waves of as many rows as the cache holds, each as slow as memory or arithmetic, plus latencies."""
    split = split_of(shape, gpu)
    assert split is not None  # `misfit_of` has said so
    rows = math.ceil(work.rows / (gpus // split))  # of a replica
    cached = 2 * 2 * shape.layers * shape.key_value_width  # bytes per token: keys and values, bfloat16
    room = 0.9 * gpu.memory * split - model_bytes(shape)
    at_once = min(rows, int(room // (cached * (work.prompt + work.response))))
    read = model_bytes(shape) + at_once * cached * (work.prompt + work.response / 2)
    memory_s = read / (split * gpu.memory_per_s * rates.decode)
    per_row = generation(shape, work) / work.rows / (split * gpu.flop_per_s * rates.forward)
    in_a_block = rates.kernels * rates.launch_s + (2 * rates.all_reduce_s if split > 1 else 0.0)
    latency = rates.step_s + shape.layers * in_a_block
    step = max(memory_s, at_once * per_row / work.response) + latency
    return math.ceil(rows / at_once) * work.response * step


def score_seconds(shape: Shape, work: Work, gpus: dict[str, float], gpu: Gpu, rates: Rates) -> float:
    """Four forwards side by side: the slowest counts."""
    language, value = language_forward(shape, work), value_forward(shape, work)
    flop = {"reward": value, "reference": language, "policy": language, "critic": value}
    return max(flop[role] / (gpus[role] * gpu.flop_per_s * rates.forward) for role in flop)


def update_seconds(shape: Shape, work: Work, ranks: float, gpu: Gpu, rates: Rates) -> float:
    """The policy's, with the critic's beside it: arithmetic, or ZeRO-3's traffic where that takes longer.

    A microbatch gathers the weights forward and backward, 2 bytes each (`training.shards.gather_in`), and scatters the gradients in
    float32. With gradient checkpoints, without which no microbatch of this size fits, a block runs forward twice.
    """
    arithmetic = 4 * work.epochs * language_forward(shape, work) / (ranks * gpu.flop_per_s * rates.training)
    passes = work.epochs * max(1.0, work.rows * (work.prompt + work.response) / ranks / rates.microbatch_tokens)
    wire = gpu.link_per_s if ranks <= NODE else gpu.network_per_s
    return max(arithmetic, passes * 4 * model_bytes(shape) * (ranks - 1) / ranks / wire)


def sync_seconds(shape: Shape, gpus: dict[str, float], gpu: Gpu) -> float:
    """Tensor by tensor the policy's ranks gather in float32, and rank 0 sends it in bfloat16 to all generators by one broadcast,
    whose time does not grow with their number (`training.weight_channel`). What is done between two tensors is not in it."""
    size = model_bytes(shape)
    gather = gpu.link_per_s if gpus["policy"] <= NODE else gpu.network_per_s
    send = gpu.link_per_s if gpus["policy"] + gpus["generation"] <= NODE else gpu.network_per_s
    return 2 * size / gather + size / send


def store_seconds(shape: Shape, gpus: dict[str, float], gpu: Gpu, rates: Rates) -> float:
    """The other way: rank 0 gathers in float32, copies to the host, puts into the store; nodes pull, in a tree; generators copy it
    in. For roles that share GPUs on several nodes, and for generation ahead of training."""
    size, split = model_bytes(shape), split_of(shape, gpu)
    assert split is not None  # `misfit_of` has said so
    wire = gpu.link_per_s if gpus["policy"] <= NODE else gpu.network_per_s
    nodes = math.ceil(gpus["generation"] / NODE)
    rounds = math.ceil(math.log2(nodes + 1)) if gpus["generation"] + gpus["policy"] > NODE else 0
    ways = [2 * size / wire, size / rates.host_copy_per_s, size / rates.store_per_s, rounds * size / rates.pull_per_s]
    return sum(ways) + size / split / rates.host_copy_per_s


def planned_shape(shape: Shape) -> ModelShape:
    """As the memory plan has it."""
    return ModelShape(
        parameters=shape.weights, blocks=(shape.block_weights,) * shape.layers, embeddings=shape.vocabulary * shape.width,
        layers=shape.layers, width=shape.width, vocabulary=shape.vocabulary, key_value_width=shape.key_value_width,
        heads=shape.heads, feed_forward=shape.feed_forward or 4 * shape.width, family="llama" if shape.gated else "gpt2",
        gated=shape.gated,
    )  # fmt: skip


def training_bytes(shape: Shape, work: Work, ranks: float, rates: Rates) -> float:
    """Of a rank of the policy on its GPU, under ZeRO-3 with gradient checkpoints, by the memory plan (`models.memory`)."""
    planned, whole, count = planned_shape(shape), shape.weights, max(1, int(ranks))
    tokens, longest = rates.microbatch_tokens, work.prompt + work.response
    held = HeldWeights(trained=whole, frozen=0.0, cast=whole, cast_at_once=planned.head + planned.blocks[0])
    state = model_state(whole, zero_stage=3, ranks=count).parts
    buffers = buffer_bytes(whole, weights=whole, held=held.bytes, zero_stage=3, ranks=count, on_gpu=True)
    kept = kept_bytes(planned, tokens=tokens, longest=longest, itemsize=2, checkpointing=True, on_gpu=True)
    logits = 2.0 * 2 * tokens * work.response / longest * shape.vocabulary
    casts = cast_bytes(held, itemsize=2, checkpointing=True)
    return CONTEXT + sum(state.values()) + sum(buffers.values()) + kept + logits + casts


def copy_misfit(shape: Shape, gpu: Gpu) -> str:
    """Why a generator's actor has no room for the copy of the model that it keeps beside vLLM's parts; "" where it has."""
    split = split_of(shape, gpu)
    if split is None or split == 1 or model_bytes(shape) * (1 + 1 / split) <= 0.9 * gpu.memory:
        return ""
    return (
        f"the copy of the model that an actor keeps beside vLLM's, {model_bytes(shape) / 1e9:.0f} GB on one GPU, does not fit; "
        "the seconds are as if it did"
    )


def misfit_of(shape: Shape, work: Work, gpus: dict[str, float], gpu: Gpu, rates: Rates) -> str:
    """Why the roles can't hold the model; "" where they can."""
    size, split = model_bytes(shape), split_of(shape, gpu)
    if split is None or gpus["generation"] < split:
        return "generation does not fit"
    if training_bytes(shape, work, gpus["policy"], rates) > gpu.memory:
        return "training state does not fit"
    if size > 0.9 * gpu.memory * gpus["reference"]:
        return "reference does not fit"
    return ""


def iteration(shape: Shape, work: Work, count: int, gpu: Gpu, rates: Rates, *, chunk_size: int) -> Iteration:
    """One PPO iteration on `count` GPUs."""
    gpus = {role: share * count for role, share in SHARES.items()}
    misfit, split = misfit_of(shape, work, gpus, gpu, rates), split_of(shape, gpu)
    if misfit:
        return Iteration({}, misfit, split, 0.0, 0.0)
    assert split is not None  # or it would be a misfit
    chunks, generators = math.ceil(work.rows / chunk_size), gpus["generation"] // split
    phases = {
        "generate": generate_seconds(shape, work, gpus["generation"], gpu, rates),
        "score": score_seconds(shape, work, gpus, gpu, rates),
        "assemble": work.rows * work.response * rates.assemble_token_s,
        "update": update_seconds(shape, work, gpus["policy"], gpu, rates),
        "sync": sync_seconds(shape, gpus, gpu),
        "calls": (5 * chunks + generators + 3 * gpus["policy"]) * rates.call_s,
    }
    language, value = language_forward(shape, work), value_forward(shape, work)
    flop = generation(shape, work) + 2 * (language + value) + 3 * work.epochs * (language + value)  # without what runs twice
    share = flop / (sum(phases.values()) * count * gpu.flop_per_s)
    return Iteration(phases, "", split_of(shape, gpu), share, store_seconds(shape, gpus, gpu, rates))


def bend_of(found: list[tuple[int, Iteration]]) -> str:
    """Where more GPUs first help least: a phase that twice the GPUs shorten by less than a fifth, though it is the longest or takes
    an eighth of the iteration. found: (GPUs, iteration), GPUs doubling."""
    fitting = [(count, each) for count, each in found if not each.misfit]
    for (_, before), (count, after) in itertools.pairwise(fitting):
        stuck = {name: seconds for name, seconds in after.phases.items() if seconds > 0.8 * before.phases[name]}
        name = max(stuck, key=lambda each: stuck[each], default=None)
        if name is not None and stuck[name] >= after.seconds / 8:
            share = stuck[name] / after.seconds
            took = f"{stuck[name]:.1f} s where half of them take {before.phases[name]:.1f}"
            return f"{name} first, at {count} GPUs: {took} ({share:.0%} of all)"
    return "nowhere up to here"
