"""The PPO stage's memory, actor by actor, before any of it exists.   Bytes. The supervised stages': `stage_memory`.

What an actor takes is said in parts: weights, gradients and moments as its ZeRO stage divides them, DeepSpeed's buffers, what a
backward pass keeps, logits, autocast's 16-bit copies, the cache of keys and values, and the sets of tokens that truncated sampling
draws among. `actors.memory_plan` adds them up per GPU and per node.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from rlhf_ray.config import GroupConfig, Recipe, RoleConfig
from rlhf_ray.models.activations import cast_bytes, kept_bytes, passing_bytes
from rlhf_ray.models.generation_memory import VLLM_ELSE, generation_bytes
from rlhf_ray.models.size import ModelShape, parameters, shape_of_model, shape_of_other, trained_parameters
from rlhf_ray.models.support_memory import (
    longest_of,
    response_share,
    support_bytes,
    support_mask_bytes,
    support_tokens,
)
from rlhf_ray.models.training_state import buffer_bytes, loading_bytes, model_state
from rlhf_ray.tables.engines import ENGINES

GB = 1e9
IMPORTED = 0.44e9  # a process that has imported torch, transformers and DeepSpeed, before its model
FORKED = 0.12e9  # the same as a fork of another process: what the two do not share
#: of each process on a GPU: CUDA's context and the work spaces of its libraries. Assumed, never measured here.
CONTEXT = 0.8e9
#: What glibc keeps on a CPU of memory that comes and goes between tensors that stay: as much again as the activations, or this
#: share of the gradients if that is more; an embedding's is mapped by itself. Measured (rlhf_ray/bench/memory_peaks.py).
HEAP_GRADIENTS = 1.3
FIRST_USE = 0.06e9  # kernels and work spaces that libraries make in a CPU process when it first computes; measured there too
GPU_PIECE = 2.0 * 4 * 2**27  # float32 logits that a GPU works on at a time, twice (`algorithms.logprobs.PIECE`)
STATE = ("weights", "copies", "gradients", "optimiser")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedProcess:
    """Bytes of one process that holds models."""

    parts: Mapping[str, float]  # where it computes: on its GPU, or in the host's memory
    on_gpu: bool
    host: Mapping[str, float] = field(default_factory=dict)  # in the host's memory, of one that computes on a GPU
    loading: tuple[float, float] = (0.0, 0.0)  # on the device and on the host, while it loads its model
    file: float = 0.0  # mapped while it loads, beside what it makes of it; one copy per node, which the system may drop
    gpus: int = 1  # that hold the parts in `split` together
    split: Mapping[str, float] = field(default_factory=dict)
    heap: float = 0.0  # on a CPU: what the C library keeps of memory that came and went

    @property
    def state(self) -> float:
        """Always there."""
        return sum(value for name, value in self.parts.items() if name in STATE)

    @property
    def work(self) -> float:
        """What a forward or backward pass or a batch of generation adds."""
        return sum(value for name, value in self.parts.items() if name not in STATE)

    @property
    def gpu(self) -> float:
        """The most on any of its GPUs, without CUDA's own."""
        return max(self.loading[0], self.state + self.work + sum(self.split.values()) / self.gpus) if self.on_gpu else 0.0

    @property
    def memory(self) -> float:
        """The most in the host's memory, without what it imports and without mapped files."""
        if self.on_gpu:
            return max(self.loading[1], sum(self.host.values()))
        return max(self.loading[1], self.state + self.work + self.heap + FIRST_USE)

    @property
    def peak(self) -> float:
        """The most that its resident memory grows by on a CPU, mapped files included."""
        return max(self.loading[1] + self.file, self.memory)


@dataclass(frozen=True, slots=True)
class RoleMemory:
    """One actor of a role."""

    role: str
    config: RoleConfig
    process: PlannedProcess

    @property
    def state(self) -> float:
        return self.process.state

    @property
    def work(self) -> float:
        return self.process.work

    @property
    def model(self) -> float:
        """Where it computes."""
        return self.state + self.work


def memory_plan(
    recipe: Recipe, *, itemsize: int = 4, gpu_itemsize: int = 2, support: int | None = None
) -> list[RoleMemory]:
    """One row per role of the PPO stage. itemsize, gpu_itemsize: bytes of the dtype that roles compute in on CPUs and on GPUs.
    support: tokens that each token is drawn among; None: the most that there can be (`support_tokens`)."""
    support = support_tokens(recipe) if support is None else support
    trained, rows = trained_by_role(recipe), []
    for name, role in recipe.ppo_roles.items():
        bytes_each = gpu_itemsize if role.gpus > 0 else itemsize
        if isinstance(role, GroupConfig):
            process = _trainer(recipe, name, role, trained[name], bytes_each, support)
        elif name == "generation":
            given = {"float32": 4, "bfloat16": 2}.get(recipe.generation.precision, bytes_each)
            process = _generator(recipe, role, given, support)
        else:
            process = _scorer(recipe, name, role, bytes_each, support)
        rows.append(RoleMemory(name, role, process))
    return rows


def _trainer(recipe: Recipe, name: str, role: GroupConfig, trained: int, itemsize: int, support: int) -> PlannedProcess:
    shape, ppo, on_gpu = shape_of_model(recipe), recipe.ppo, role.gpus > 0
    state = model_state(
        shape.parameters, trained, zero_stage=role.zero_stage, ranks=role.actors,
        offload_optimizer=role.offload_optimizer and on_gpu, offload_param=role.offload_param and on_gpu,
    )  # fmt: skip
    tokens, head = pass_tokens(recipe, ranks=role.actors), name == "policy"
    kept = kept_bytes(
        shape, tokens=tokens, longest=longest_of(recipe), itemsize=itemsize, checkpointing=ppo.gradient_checkpointing,
        on_gpu=on_gpu,
    )  # fmt: skip
    work = buffer_bytes(shape.parameters, trained, zero_stage=role.zero_stage, ranks=role.actors, on_gpu=on_gpu) | {
        "16-bit copies": cast_bytes(shape, itemsize=itemsize, checkpointing=ppo.gradient_checkpointing),
        "activations": kept,
    }
    if ppo.lora is None and head:  # of the output layer, beside the sum that it is added to
        work["buckets"] += 4.0 * shape.vocabulary * shape.width
    if head:
        work["logits"] = trained_logits(recipe, tokens=tokens, itemsize=itemsize, on_gpu=on_gpu)
        work["sampling sets"] = support_mask_bytes(recipe, support, tokens=tokens)
    snapshot = 12.0 * trained / role.actors if snapshot_bytes(recipe) else 0.0
    host = dict(state.host) | {"snapshot": snapshot}
    if head and sends_by_store(recipe):
        host["weights to send"] = 4.0 * trained
    loading = loading_bytes(shape.parameters, mapped=recipe.sft is not None)
    return PlannedProcess(parts=dict(state.parts) | work, on_gpu=on_gpu, host=host if on_gpu else {}, loading=loading,
                   heap=heap_bytes(shape, trained, kept))  # fmt: skip


def heap_bytes(shape: ModelShape, trained: int, activations: float) -> float:
    """Of a process that trains on a CPU."""
    return max(activations, HEAP_GRADIENTS * 4.0 * (trained - shape.embeddings))


def _generator(recipe: Recipe, role: RoleConfig, itemsize: int, support: int) -> PlannedProcess:
    generation, on_gpu = recipe.generation, role.gpus > 0
    shape = shape_of_model(recipe)
    model = float(itemsize) * shape.parameters
    engine = ENGINES.named(generation.engine)
    own, batch = engine.copies[on_gpu] * model, generation_bytes(recipe, itemsize=itemsize)
    parts = {"weights": model + (4.0 * shape.parameters if recipe.ppo.lora is not None else 0.0)}  # what merged weights are of
    if own:
        parts["copies"] = own
    parts |= batch
    heap = 0.0
    if generation.engine != "vllm":
        prompts = generation.rows * recipe.data.max_prompt_tokens
        parts["passing"] = passing_bytes(shape, tokens=prompts, itemsize=itemsize)
        heap = parts["passing"] + own  # new weights are copied while the old copies stand
    # each row's own sets, and the chunk's together
    parts["sampling sets"] = 2.0 * support_bytes(generation.chunk_size * generation.max_new_tokens, support)
    split: dict[str, float] = {}
    if generation.tensor_parallel > 1:
        split = {name: parts.pop(name) for name in ("copies", "cache") if name in parts}
    if on_gpu and generation.engine == "vllm":
        parts["engine"] = VLLM_ELSE
    return PlannedProcess(
        parts=parts, on_gpu=on_gpu, loading=(model, model if itemsize == 2 or recipe.sft is None else 0.0),
        file=4.0 * shape.parameters if itemsize == 2 else 0.0, gpus=generation.tensor_parallel, split=split, heap=heap,
    )  # fmt: skip


def _scorer(recipe: Recipe, name: str, role: RoleConfig, itemsize: int, support: int) -> PlannedProcess:
    shape, tokens, on_gpu = shape_of_model(recipe), pass_tokens(recipe), role.gpus > 0
    models = scorer_parameters(recipe) if name == "reward" else [shape.parameters]
    parts = {"weights": 4.0 * sum(models)}
    if models:
        parts |= {
            "passing": passing_bytes(shape, tokens=tokens, itemsize=itemsize),
            "16-bit copies": 2.0 * max(models) if itemsize == 2 else 0.0,  # for as long as a pass lasts
        }
    if name == "reference":
        logits = response_share(recipe) * tokens * shape.vocabulary
        parts["logits"] = logits * itemsize + (min(GPU_PIECE, 8.0 * logits) if on_gpu else 0.0)
        parts["sampling sets"] = support_mask_bytes(recipe, support, tokens=tokens)
    own = name == "reference" and recipe.sft is None  # else from a stage's float32 file, which is mapped
    return PlannedProcess(parts=parts, on_gpu=on_gpu, loading=(0.0, 4.0 * shape.parameters if own else 0.0))


def scorer_parameters(recipe: Recipe) -> list[int]:
    """Of each model that the reward role holds: those of the reward stage, and those from elsewhere."""
    models = {term.model for term in recipe.ppo.terms.values()} - {None}
    own, reward = parameters(recipe), recipe.reward
    found = [own] * reward.members if "reward" in models and reward is not None else []
    for name in models - {"reward"}:
        assert name is not None
        found.append(shape_of_other(recipe, name).parameters or own)  # as large as the policy, as far as is known
    return found


def trained_by_role(recipe: Recipe) -> dict[str, int]:
    """Trained role -> the number of its weights that train."""
    ppo = recipe.ppo
    found = {"policy": trained_parameters(recipe, ppo.lora, ppo.freeze_layers)}
    if ppo.has_critic:
        found["critic"] = trained_parameters(recipe, ppo.critic_lora, ppo.critic_freeze_layers)
    return found


def sends_by_store(recipe: Recipe) -> bool:
    """Whether new weights go through the object store, not from GPU to GPU."""
    resources = recipe.resources
    on_gpus = resources.policy.gpus > 0 and resources.generation.gpus > 0
    return not on_gpus or resources.weight_transport == "object_store" or recipe.ppo.steps_ahead > 0


def snapshot_bytes(recipe: Recipe) -> float:
    """Of the two snapshots of all that trains, weights and two moments, in the object store; 0 where the recipe has none."""
    needed = 2 * 12.0 * sum(trained_by_role(recipe).values())
    return needed if needed <= recipe.resources.snapshot_gb * GB else 0.0


def trained_logits(recipe: Recipe, *, tokens: int, itemsize: int, on_gpu: bool = False) -> float:
    """Logits of the responses' tokens, and their gradient."""
    logits = response_share(recipe) * tokens * shape_of_model(recipe).vocabulary
    return 2 * logits * itemsize + (min(GPU_PIECE, 8.0 * logits) if on_gpu else 0.0)


def pass_tokens(recipe: Recipe, *, ranks: int | None = None) -> int:
    """Tokens of a forward pass over the longest rows. ranks: of a role that trains, whose passes may wait for their backward."""
    ppo, longest = recipe.ppo, longest_of(recipe)
    if ranks is None:
        return ppo.microbatch_tokens or ppo.microbatch_size * longest
    rows = ppo.minibatch_size // ranks
    if ppo.reuse_forward:
        return rows * longest  # a whole step
    return min(ppo.microbatch_tokens or ppo.microbatch_size * longest, rows * longest)
