"""An estimate of the supervised stages' peak memory, before any of it exists.   Bytes, per worker.

Their workers run before PPO's actors, and one of them is often the largest process of a run: it holds the logits of whole
sequences, where PPO computes those of responses only.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_ray.config import DpoConfig, Recipe, RewardConfig, SftConfig, TrainConfig
from rlhf_ray.models.activations import cast_bytes, kept_bytes, passing_bytes
from rlhf_ray.models.held_weights import HeldWeights, frozen_bytes, held_weights
from rlhf_ray.models.memory import heap_bytes
from rlhf_ray.models.planned_process import PlannedProcess
from rlhf_ray.models.size import ModelShape, shape_of_model, shape_of_other
from rlhf_ray.models.training_state import buffer_bytes, model_state
from rlhf_ray.tables.families import is_tested

#: Bytes per logit at the peak of a language model's loss, in 16 bits as in 32: on packed lines and under DPO, whose log-probs make
#: no float32 copy of all of them, and in the plain loss. Measured (tests/test_stage_memory.py).
LOGIT, PLAIN_LOGIT = 12, 23
HEAP_SHARE = (
    0.5  # of what the heap keeps of PPO's passes: at the peak, that of the logits, it has less. Measured likewise
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMemory:
    stage: str
    workers: int
    gpus: float  # per worker
    process: PlannedProcess

    @property
    def state(self) -> float:
        return self.process.state

    @property
    def work(self) -> float:
        return self.process.work


def stage_memory_plan(recipe: Recipe, itemsizes: dict[str, int]) -> list[StageMemory]:
    """One row per supervised stage. itemsizes: stage -> bytes of the dtype that it computes in."""
    return [
        StageMemory(
            stage=name,
            workers=config.workers,
            gpus=config.gpus_per_worker,
            process=_process(recipe, name, config, itemsizes[name]),
        )
        for name, config in recipe.trained.items()
    ]


def _process(recipe: Recipe, name: str, config: TrainConfig, itemsize: int) -> PlannedProcess:
    shape, on_gpu, stage, ranks = _shape(recipe, config), config.gpus_per_worker > 0, config.zero_stage, config.workers
    language = not isinstance(config, RewardConfig)
    whole = shape.parameters if language else shape.body
    held = held_weights(
        shape, recipe.model, lora=config.lora, freeze_layers=config.freeze_layers, language=language, itemsize=itemsize
    )
    state = model_state(
        held.trained, frozen=held.frozen, zero_stage=stage, ranks=ranks,
        offload_optimizer=config.offload_optimizer and on_gpu, offload_param=config.offload_param and on_gpu,
    )  # fmt: skip
    buffers = buffer_bytes(
        held.trained,
        weights=whole,
        held=held.bytes,
        zero_stage=stage,
        ranks=ranks,
        on_gpu=on_gpu,
        low_sums=itemsize == 2,
    )
    reference = {"copies": frozen_bytes(shape, whole, itemsize=itemsize)} if isinstance(config, DpoConfig) else {}
    from_stage = isinstance(config, DpoConfig) or (
        isinstance(config, RewardConfig) and config.base in ("sft", "fluency")
    )
    mapped = from_stage and recipe.sft is not None
    work = _work(recipe, name, config, shape, held, itemsize)
    work["buckets"] = work.get("buckets", 0.0) + buffers.pop("buckets")
    measuring = _measuring(recipe, name, config, shape, itemsize)
    on_host = (0.0 if mapped else 4.0 * whole) + (held.frozen if itemsize == 2 else 0.0)  # while it loads
    part = config.lora is not None or config.freeze_layers > 0
    return PlannedProcess(
        parts=dict(state.parts) | reference | buffers | work, on_gpu=on_gpu,
        host=dict(state.host) | {"copy for a checkpoint": 12.0 * held.trained / ranks},
        moments={
            "model to be written": 4.0 * held.trained + 4.0 * whole if part else 4.0 * whole if on_gpu or stage == 3 else 0.0,
        },
        loading=(max(held.bytes if stage == 3 else 0.0, measuring), on_host) if on_gpu else (0.0, max(on_host, measuring)),
        heap=HEAP_SHARE * heap_bytes(shape, held.trained, work["activations"]),
    )  # fmt: skip


def _measuring(recipe: Recipe, name: str, config: TrainConfig, shape: ModelShape, itemsize: int) -> float:
    """When it has trained and let go of that: the saved model in float32, one layer's 16-bit copy, the logits of a microbatch."""
    language, tokens = not isinstance(config, RewardConfig), config.microbatch_size * recipe.max_length_of(name)
    models = 2 if isinstance(config, DpoConfig) else 1
    logits = (
        float(tokens) * shape.vocabulary * (itemsize + 8) if language else 0.0
    )  # as they are, float32, and their log-probs
    layer = 2.0 * shape.head if itemsize == 2 and language else 0.0
    whole = shape.parameters if language else shape.body
    return 4.0 * whole * models + layer + max(logits, passing_bytes(shape, tokens=tokens, itemsize=itemsize))


def _shape(recipe: Recipe, config: TrainConfig) -> ModelShape:
    if isinstance(config, RewardConfig) and not config.starts_within_run:
        return shape_of_other(recipe, config.base)
    return shape_of_model(recipe)


def _work(
    recipe: Recipe, name: str, config: TrainConfig, shape: ModelShape, held: HeldWeights, itemsize: int
) -> dict[str, float]:
    """Where every row is as long as the recipe allows."""
    pairs = isinstance(config, DpoConfig) or (isinstance(config, RewardConfig) and config.objective == "pairs")
    longest = recipe.max_length_of(name)
    tokens, checkpointing = config.microbatch_size * longest * (2 if pairs else 1), config.gradient_checkpointing
    work = {
        "activations": kept_bytes(
            shape, tokens=tokens, longest=longest, itemsize=itemsize, checkpointing=checkpointing,
            on_gpu=config.gpus_per_worker > 0,
        ),
        "16-bit copies": cast_bytes(held, itemsize=itemsize, checkpointing=checkpointing),
    }  # fmt: skip
    # A gradient of the embeddings stands beside the sum that it is added to, and so does that of an output layer.
    if config.lora is None and config.freeze_layers == 0:
        work["buckets"] = 4.0 * shape.embeddings * (1 if isinstance(config, RewardConfig) else 2)
    if isinstance(config, RewardConfig):
        return work
    on_lines = isinstance(config, DpoConfig) or (
        is_tested(shape.family) and config.gpus_per_worker == 0 and not _packs(config)
    )
    work["logits"] = float(tokens) * shape.vocabulary * (LOGIT if on_lines else PLAIN_LOGIT)
    if isinstance(config, DpoConfig) and itemsize == 2 and not shape.output:
        work["16-bit copies"] += 2.0 * shape.head  # of the reference's tied embeddings
    return work


def _packs(config: TrainConfig) -> bool:
    return isinstance(config, SftConfig) and config.packing
