"""An estimate of the supervised stages' peak memory, before any of it exists.   Bytes, per worker.

Their workers run before PPO's actors, and one of them is often the largest process of a run: it holds the logits of whole
sequences, where PPO computes those of responses only.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from rlhf_ray.config import DpoConfig, Recipe, RewardConfig, SftConfig, TrainConfig
from rlhf_ray.models.memory import GB, IMPORTED, kept_bytes
from rlhf_ray.models.size import ModelShape, adapter_parameters, shape_of_model, shape_of_other
from rlhf_ray.tables.families import is_tested

#: Bytes per logit at the peak of a language model's loss, in 16 bits as in 32: on packed lines and under DPO, whose log-probs make
#: no float32 copy of all of them, and in the plain loss. Measured (tests/test_stage_memory.py).
LOGIT, PLAIN_LOGIT = 12, 23


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMemory:
    stage: str
    workers: int
    gpus: float  # per worker
    state: float  # weights, gradients, moments: always there
    work: float  # what a forward and backward pass adds

    @property
    def worker(self) -> float:
        """Of one worker, with what it imports."""
        return IMPORTED + self.state + self.work


def stage_memory_plan(recipe: Recipe, itemsizes: dict[str, int]) -> list[StageMemory]:
    """One row per supervised stage. itemsizes: stage -> bytes of the dtype that it computes in."""
    rows: list[StageMemory] = []
    for name, config in recipe.trained.items():
        shape, itemsize = _shape(recipe, config), itemsizes[name]
        trained = 12.0 * _trained(recipe, config, shape)  # gradients and two moments, in float32
        state = 4.0 * shape.parameters + (trained / config.workers if config.zero_stage >= 2 else trained)
        if config.zero_stage == 3:
            state = (4.0 * shape.parameters + trained) / config.workers
        if config.zero_stage in (1, 2):
            state += 4.0 * shape.parameters / config.workers  # its own copy of the rank's share
        if isinstance(config, DpoConfig):
            state += 4.0 * shape.parameters  # the reference
        work = _work(recipe, name, config, shape, itemsize)
        rows.append(StageMemory(stage=name, workers=config.workers, gpus=config.gpus_per_worker, state=state, work=work))
    return rows


def _shape(recipe: Recipe, config: TrainConfig) -> ModelShape:
    if isinstance(config, RewardConfig) and not config.starts_within_run:
        return shape_of_other(recipe, config.base)
    return shape_of_model(recipe)


def _trained(recipe: Recipe, config: TrainConfig, shape: ModelShape) -> float:
    if config.lora is not None:
        return adapter_parameters(recipe.model, config.lora)
    frozen = shape.embeddings + sum(shape.blocks[: config.freeze_layers]) if config.freeze_layers > 0 else 0
    return shape.parameters - frozen


def _work(recipe: Recipe, name: str, config: TrainConfig, shape: ModelShape, itemsize: int) -> float:
    """Where every row is as long as the recipe allows."""
    pairs = isinstance(config, DpoConfig) or (isinstance(config, RewardConfig) and config.objective == "pairs")
    tokens = config.microbatch_size * recipe.max_length_of(name) * (2 if pairs else 1)
    kept = kept_bytes(shape, tokens=tokens, itemsize=itemsize, checkpointing=config.gradient_checkpointing)
    # A gradient of the embeddings stands beside the sum that it is added to, and so does that of an output layer.
    if config.lora is None and config.freeze_layers == 0:
        kept += 4.0 * shape.embeddings * (1 if isinstance(config, RewardConfig) else 2)
    if isinstance(config, RewardConfig):
        return kept
    on_lines = isinstance(config, DpoConfig) or (is_tested(shape.family) and config.gpus_per_worker == 0 and not _packs(config))
    logits = float(tokens) * shape.vocabulary * (LOGIT if on_lines else PLAIN_LOGIT)
    if isinstance(config, DpoConfig) and itemsize == 2:
        kept += 2.0 * shape.parameters  # autocast's copies of the reference
    return kept + logits


def _packs(config: TrainConfig) -> bool:
    return isinstance(config, SftConfig) and config.packing


def stage_memory_problems(
    recipe: Recipe, *, host: float, itemsizes: dict[str, int], stages: Collection[str] | None = None
) -> list[str]:
    """Those of the stages (None: all) that don't fit into `host` bytes of memory, in sentences with the remedy."""
    problems: list[str] = []
    for row in stage_memory_plan(recipe, itemsizes):
        needed = row.workers * row.worker
        if row.gpus > 0 or needed <= host or (stages is not None and row.stage not in stages):
            continue
        section = recipe.trained[row.stage]
        remedy = f"lower {row.stage}.microbatch_size or {row.stage}.max_length"
        if row.work <= row.state:
            remedy = f"set {row.stage}.lora, use a smaller model" + (", or fewer workers" if row.workers > 1 else "")
        elif not section.gradient_checkpointing:
            remedy += f", or set {row.stage}.gradient_checkpointing to true"
        part, what = (row.work, "for a batch") if row.work > row.state else (row.state, "of weights, gradients and moments")
        problems.append(
            f"the stage {row.stage} needs about {needed / GB:.1f} GB of memory, this machine has {host / GB:.1f} GB; most of it is "
            f"{part / GB:.1f} GB {what} per worker; {remedy}"
        )
    return problems
