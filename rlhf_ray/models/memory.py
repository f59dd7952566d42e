"""The PPO stage's memory, actor by actor, before any of it exists.   Bytes. The supervised stages': `stage_memory`.

What an actor takes is said in parts: weights, gradients and moments as its ZeRO stage divides them, DeepSpeed's buffers, what a
backward pass keeps, logits, autocast's 16-bit copies, the cache of keys and values, and the sets of tokens that truncated sampling
draws among. `actors.memory_plan` adds them up per GPU and per node.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from rlhf_ray.config import GroupConfig, Recipe, RoleConfig
from rlhf_ray.models.activations import cast_bytes, kept_bytes, passing_bytes
from rlhf_ray.models.generation_memory import VLLM_ELSE, copy_on_host, generation_bytes, prefill_bytes
from rlhf_ray.models.held_weights import HeldWeights, frozen_bytes, held_weights
from rlhf_ray.models.logit_memory import head_copy, head_pieces, scored_logits, trained_logits
from rlhf_ray.models.planned_process import GB, PlannedProcess
from rlhf_ray.models.sent_weights import Transport, received_bytes, shared_bytes, staged_bytes
from rlhf_ray.models.size import ModelShape, shape_of_model, shape_of_other
from rlhf_ray.models.support_memory import (
    longest_of,
    support_bytes,
    support_mask_bytes,
    support_tokens,
)
from rlhf_ray.models.training_state import buffer_bytes, model_state
from rlhf_ray.models.turns import idle_in_updates, resting, takes_turns, trainer_turns
from rlhf_ray.tables.engines import ENGINES
from rlhf_ray.tables.families import is_tested

#: What glibc keeps on a CPU of memory that comes and goes between tensors that stay: as much again as the activations, or this
#: share of the gradients if that is more; an embedding's is mapped by itself. Measured (rlhf_ray/bench/memory_peaks.py).
HEAP_GRADIENTS = 1.3
HEAP_PROMPTS = 0.55  # of what a pass over prompts takes. Measured there


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
    recipe: Recipe, *, itemsize: int = 4, gpu_itemsize: int = 2, support: int | None = None, way: Transport = "object_store"
) -> list[RoleMemory]:
    """One row per role of the PPO stage. itemsize, gpu_itemsize: bytes of the dtype that roles compute in on CPUs and on GPUs.
    support: tokens that each token is drawn among; None: the most that there can be (`support_tokens`). way: new weights'."""
    support = support_tokens(recipe) if support is None else support
    rows = []
    for name, role in recipe.ppo_roles.items():
        bytes_each = gpu_itemsize if role.gpus > 0 else itemsize
        if isinstance(role, GroupConfig):
            process = _trainer(recipe, name, role, bytes_each, support, way)
        elif name == "generation":
            given = {"float32": 4, "bfloat16": 2}.get(recipe.generation.precision, bytes_each)
            process = _generator(recipe, role, given, support, way)
        else:
            process = _scorer(recipe, name, role, bytes_each, support)
        rows.append(RoleMemory(name, role, process))
    return rows


def _trainer(recipe: Recipe, name: str, role: GroupConfig, itemsize: int, support: int, way: Transport) -> PlannedProcess:
    shape, ppo, on_gpu, language = shape_of_model(recipe), recipe.ppo, role.gpus > 0, name == "policy"
    held, stage = _held(recipe, name, itemsize), role.zero_stage
    whole = shape.parameters if language else shape.body
    state = model_state(
        held.trained, frozen=held.frozen, zero_stage=stage, ranks=role.actors,
        offload_optimizer=role.offload_optimizer and on_gpu, offload_param=role.offload_param and on_gpu,
    )  # fmt: skip
    tokens = pass_tokens(recipe, ranks=role.actors)
    kept = kept_bytes(
        shape, tokens=tokens, longest=longest_of(recipe), itemsize=itemsize, checkpointing=ppo.gradient_checkpointing,
        on_gpu=on_gpu,
    )  # fmt: skip
    gathered, cast = held.bytes, cast_bytes(held, itemsize=itemsize, checkpointing=ppo.gradient_checkpointing)
    copied = ppo.lora is None or not shape.output  # the head's weights: a frozen output layer is held as it is multiplied
    whole_head = shape.head if language and copied and ppo.float32_head and itemsize == 2 else 0  # in float32: no copy
    cast -= 2.0 * whole_head
    if stage == 3 and itemsize == 2:  # linear layers arrive in 16 bits (`training.shards.gather_in`), tied embeddings are copied
        tied = shape.head if language and not shape.output and not whole_head else 0
        gathered, cast = gathered - 2.0 * (held.cast - tied - whole_head), 2.0 * tied
    work = buffer_bytes(
        held.trained, weights=whole, held=gathered, zero_stage=stage, ranks=role.actors, on_gpu=on_gpu
    ) | {
        "16-bit copies": cast,
        "activations": kept,
    }
    if ppo.lora is None and language:  # of the output layer, beside the sum that it is added to
        work["buckets"] += 4.0 * shape.head
    if language and (shared := shared_bytes(way, held.trained, itemsize)):
        work["shared weights"] = shared
    heap = heap_bytes(shape, held.trained, kept)
    if language:
        in_pieces = ppo.entropy_coef > 0 and stage < 3 and is_tested(shape.family)
        count = head_pieces if in_pieces else trained_logits
        work["logits"] = logits = count(recipe, tokens=tokens, itemsize=itemsize, on_gpu=on_gpu)
        heap = max(heap - logits, 0.0) if in_pieces else heap  # the pieces are gone when other memory begins to come and go
        work["sampling sets"] = support_mask_bytes(recipe, support, tokens=tokens)
    beside = {"copy for a checkpoint": 12.0 * held.trained / role.actors}
    if language and (staged := staged_bytes(recipe, way, held.trained, itemsize)):
        beside["staged weights"] = staged
    parts, turns = dict(state.parts) | work, {}
    if on_gpu and takes_turns(recipe, role):
        beside |= resting(held.trained, role)
        forward = {"passing": passing_bytes(shape, tokens=pass_tokens(recipe), itemsize=itemsize)} | {
            part: work[part] for part in ("16-bit copies", "gathered", "sampling sets") if part in work
        }
        if language:
            forward["logits"] = scored_logits(recipe, tokens=pass_tokens(recipe), itemsize=itemsize, on_gpu=True)
        turns = trainer_turns(recipe, name, role, held.trained, parts, forward)
    own = 0.0 if recipe.sft is not None else 4.0 * whole  # what is read from a float32 file is mapped, not the process's own
    return PlannedProcess(
        parts=parts, on_gpu=on_gpu, turns=turns, host=dict(state.host) | beside,
        moments=_between(recipe, language, held, whole, role, itemsize, way),
        loading=(0.0, own + (held.frozen if itemsize == 2 else 0.0)), file=4.0 * whole if recipe.sft is not None else 0.0,
        stays_mapped=2.0 * (held.frozen - 4.0 * shape.embeddings) if not own and itemsize == 2 and held.frozen else 0.0,
        first_alone=stage == 3, heap=heap,
    )  # fmt: skip


def _between(
    recipe: Recipe, language: bool, held: HeldWeights, whole: int, role: GroupConfig, itemsize: int, way: Transport
) -> dict[str, float]:
    """What stands in the host's memory between two updates, one after the other."""
    on_gpu, moments = role.gpus > 0, {}
    if snapshot_bytes(recipe) and (on_gpu or role.zero_stage > 0):  # plain tensors on a CPU are given as they are
        moments["snapshot"] = 12.0 * held.trained / role.actors
    if language:
        moments["model to be written"] = 4.0 * (held.trained + whole)
        if way == "object_store" and (on_gpu or role.zero_stage == 3 or itemsize == 2):
            moments["weights to send"] = float(itemsize) * held.trained
    return moments


def _held(recipe: Recipe, role: str, itemsize: int) -> HeldWeights:
    """Of policy or critic."""
    ppo, language = recipe.ppo, role == "policy"
    lora, freeze = (ppo.lora, ppo.freeze_layers) if language else (ppo.critic_lora, ppo.critic_freeze_layers)
    shape = shape_of_model(recipe)
    held = held_weights(shape, recipe.model, lora=lora, freeze_layers=freeze, language=language, itemsize=itemsize)
    if lora is not None and language and recipe.ppo.float32_head and itemsize == 2:
        return replace(held, frozen=held.frozen + 2.0 * shape.output)
    return held


def heap_bytes(shape: ModelShape, trained: int, activations: float) -> float:
    """Of a process that trains on a CPU."""
    return max(activations, HEAP_GRADIENTS * 4.0 * (trained - shape.embeddings))


def _generator(recipe: Recipe, role: RoleConfig, itemsize: int, support: int, way: Transport) -> PlannedProcess:
    generation, on_gpu = recipe.generation, role.gpus > 0
    shape = shape_of_model(recipe)
    model = float(itemsize) * shape.parameters
    engine = ENGINES.named(generation.engine)
    own, batch = engine.copies[on_gpu] * model, generation_bytes(recipe, itemsize=itemsize)
    before = 4.0 * (shape.body - shape.embeddings) if recipe.ppo.lora is not None else 0.0  # what merged weights are of
    copy = {"weights": model + before}
    vllm = generation.engine == "vllm"
    on_host = on_gpu and vllm and copy_on_host(generation.tensor_parallel, shares_gpu=role.gpus < 1)
    parts = {} if on_host else dict(copy)
    if own:
        parts["copies"] = own
    parts |= batch
    parts["logits"] += head_copy(recipe, shape, itemsize)
    heap = 0.0
    if not vllm:
        parts["passing"] = prefill_bytes(
            shape, rows=generation.rows, longest=recipe.data.max_prompt_tokens, itemsize=itemsize, on_gpu=on_gpu
        )
        heap = HEAP_PROMPTS * parts["passing"] + own  # new weights are copied while the old copies stand
    # each row's own sets, and the chunk's together
    parts["sampling sets"] = 2.0 * support_bytes(generation.chunk_size * generation.max_new_tokens, support)
    split: dict[str, float] = {}
    if generation.tensor_parallel > 1:
        split = {name: parts.pop(name) for name in ("copies", "cache") if name in parts}
    if on_gpu and vllm:
        parts["engine"] = VLLM_ELSE
    host = {
        "copy beside the engine": copy["weights"] if on_host else 0.0,
        "received weights": received_bytes(recipe, way, trained_by_role(recipe)["policy"], itemsize),
    }
    turns: dict[str, dict[str, float]] = {}
    if on_gpu and takes_turns(recipe, role):
        turns = idle_in_updates(recipe, {part: parts[part] for part in ("weights", "engine") if part in parts})
        host["sleeping weights"] = own  # the engine's, while it sleeps
    return PlannedProcess(
        parts=parts, on_gpu=on_gpu, turns=turns,
        host={name: size for name, size in host.items() if size},
        loading=(0.0 if on_host else model, model if itemsize == 2 or recipe.sft is None else 0.0),
        file=4.0 * shape.parameters if itemsize == 2 else 0.0, gpus=generation.tensor_parallel, split=split, heap=heap,
    )  # fmt: skip


def _scorer(recipe: Recipe, name: str, role: RoleConfig, itemsize: int, support: int) -> PlannedProcess:
    shape, tokens, on_gpu = shape_of_model(recipe), pass_tokens(recipe), role.gpus > 0
    models = scorer_shapes(recipe) if name == "reward" else [shape]
    reads = name == "reference"  # and tells log-probs: tied embeddings are copied for the product that gives logits
    counts = [each.parameters if reads else each.body for each in models]
    each_held = [frozen_bytes(each, count, itemsize=itemsize) for each, count in zip(models, counts, strict=True)]
    in_float32 = reads and recipe.ppo.float32_head and itemsize == 2
    each_held = [held + (2.0 * shape.output if in_float32 else 0.0) for held in each_held]
    parts = {"weights": sum(each_held)}
    if models:
        parts |= {
            "passing": passing_bytes(shape, tokens=tokens, itemsize=itemsize),
            "16-bit copies": 2.0 * shape.head if itemsize == 2 and reads and not shape.output and not in_float32 else 0.0,
        }
    if name == "reference":
        parts["logits"] = scored_logits(recipe, tokens=tokens, itemsize=itemsize, on_gpu=on_gpu)
        parts["sampling sets"] = support_mask_bytes(recipe, support, tokens=tokens)
    mapped = recipe.sft is not None or not reads  # a stage's float32 file
    loading = [  # of one model after the other
        (held if itemsize == 2 else 0.0) + (0.0 if mapped else 4.0 * count) for held, count in zip(each_held, counts, strict=True)
    ]
    return PlannedProcess(
        parts=parts, on_gpu=on_gpu, loading=(0.0, max(loading, default=0.0)), file=4.0 * max(counts, default=0) if mapped else 0.0,
        stays_mapped=sum(2.0 * (held - 4.0 * each.embeddings) for held, each in zip(each_held, models, strict=True))
        if mapped and itemsize == 2 else 0.0,
        turns=idle_in_updates(recipe, {"weights": parts["weights"]}) if takes_turns(recipe, role) else {},
    )  # fmt: skip


def scorer_shapes(recipe: Recipe) -> list[ModelShape]:
    """Of each model that the reward role holds: those of the reward stage, and those from elsewhere."""
    models = {term.model for term in recipe.ppo.terms.values()} - {None}
    own, reward = shape_of_model(recipe), recipe.reward
    found = [own] * reward.members if "reward" in models and reward is not None else []
    for name in models - {"reward"}:
        assert name is not None
        other = shape_of_other(recipe, name)
        found.append(other if other.parameters else own)  # as large as the policy, as far as is known
    return found


def trained_by_role(recipe: Recipe) -> dict[str, int]:
    """Trained role -> the number of its weights that train."""
    return {
        name: _held(recipe, name, 4).trained
        for name in (("policy", "critic") if recipe.ppo.has_critic else ("policy",))
    }


def snapshot_bytes(recipe: Recipe) -> float:
    """Of the two snapshots of all that trains, weights and two moments, in the object store; 0 where the recipe has none."""
    needed = 2 * 12.0 * sum(trained_by_role(recipe).values())
    return needed if needed <= recipe.resources.snapshot_gb * GB else 0.0


def pass_tokens(recipe: Recipe, *, ranks: int | None = None) -> int:
    """Tokens of a forward pass over the longest rows. ranks: of a role that trains, whose passes may wait for their backward."""
    ppo, longest = recipe.ppo, longest_of(recipe)
    if ranks is None:
        return ppo.microbatch_tokens or ppo.microbatch_size * longest
    rows = ppo.minibatch_size // ranks
    if ppo.reuse_forward:
        return rows * longest  # a whole step
    return min(ppo.microbatch_tokens or ppo.microbatch_size * longest, rows * longest)
