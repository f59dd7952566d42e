"""The memory of the one process that evaluates, and of one that serves, before any of it exists.   Bytes.

An evaluation (`evaluation.evaluate`) has the model that PPO started from in memory all through, and beside it, one after the other:
each tuned model while it draws and while responses are rated; the reward models; the judge; the independent language model.
"""

from __future__ import annotations

from collections.abc import Mapping

from rlhf_ray.config import Recipe, RewardConfig
from rlhf_ray.models.activations import passing_bytes
from rlhf_ray.models.generation_memory import VLLM_ELSE, cache_of, generation_bytes, prefill_bytes
from rlhf_ray.models.held_weights import frozen_bytes
from rlhf_ray.models.logit_memory import head_copy, scored_logits
from rlhf_ray.models.memory import pass_tokens, scorer_shapes
from rlhf_ray.models.planned_process import PlannedProcess
from rlhf_ray.models.size import ModelShape, shape_of_model, shape_of_other
from rlhf_ray.models.support_memory import longest_of
from rlhf_ray.tables.engines import ENGINES

SERVED_ROWS = 32  # choices decoded together: `serving.config.Limits.max_rows`


def evaluation_process(recipe: Recipe, *, on_gpu: bool, itemsize: int) -> PlannedProcess:
    """With the parts of the moment that takes most. itemsize: bytes of the dtype that its language models are loaded in."""
    shape, tokens = shape_of_model(recipe), pass_tokens(recipe)
    model = float(itemsize) * shape.parameters
    passing = passing_bytes(shape, tokens=tokens, itemsize=itemsize)
    moments: list[tuple[dict[str, float], dict[str, float]]] = [_drawing(recipe, shape, model, on_gpu, itemsize)]
    logits = scored_logits(recipe, tokens=tokens, itemsize=itemsize, on_gpu=on_gpu) + head_copy(recipe, shape, itemsize)
    moments.append(({"weights": 2 * model, "passing": passing, "logits": logits}, {}))
    rewards = scorer_shapes(recipe)
    for models in (rewards, _judge(recipe), [*rewards, *_judge(recipe)] if recipe.judge is not None else []):
        held = sum(frozen_bytes(each, each.body, itemsize=itemsize) for each in models)
        moments.append(({"weights": model + held, "passing": passing if models else 0.0}, {}))
    gpus = recipe.generation.tensor_parallel if on_gpu else 1
    parts, split = max(moments, key=lambda each: sum(each[0].values()) + sum(each[1].values()) / gpus)
    return PlannedProcess(
        parts=parts, on_gpu=on_gpu, loading=(0.0, model if on_gpu or itemsize == 2 else 0.0), gpus=gpus, split=split,
        file=model if recipe.sft is not None else 0.0,
    )  # fmt: skip


def _drawing(
    recipe: Recipe, shape: ModelShape, model: float, on_gpu: bool, itemsize: int
) -> tuple[dict[str, float], dict[str, float]]:
    """(parts of the first GPU, what all GPUs of an engine hold together): a tuned model draws, the first stands beside it."""
    engine = ENGINES.named(recipe.generation.engine)
    own = {"copies": engine.copies[on_gpu] * model} | generation_bytes(recipe, itemsize=itemsize)
    parts = {"weights": 2 * model, "logits": own.pop("logits") + head_copy(recipe, shape, itemsize)}
    if recipe.generation.engine == "vllm":
        parts["engine"] = VLLM_ELSE if on_gpu else 0.0
    else:
        parts["passing"] = prefill_bytes(
            shape, rows=recipe.generation.rows, longest=recipe.data.max_prompt_tokens, itemsize=itemsize, on_gpu=on_gpu
        )
    if on_gpu and recipe.generation.tensor_parallel > 1:  # the tuned model's plain copy is on the host then
        return parts | {"weights": model}, own
    return parts | own, {}


def _judge(recipe: Recipe) -> list[ModelShape]:
    if not isinstance(recipe.judge, RewardConfig) or recipe.evaluation.judge_function is not None:
        return []
    base = recipe.judge
    shape = shape_of_model(recipe) if base.starts_within_run else shape_of_other(recipe, base.base)
    return [shape] * base.members


def serving_process(recipe: Recipe, *, on_gpu: bool, itemsize: int, rows: int = SERVED_ROWS) -> PlannedProcess:
    """One replica of `rlhf-ray serve`, `rows` choices as long as training's at once."""
    shape, engine = shape_of_model(recipe), ENGINES.named(recipe.generation.engine)
    model = float(itemsize) * shape.parameters
    parts: Mapping[str, float] = {
        "weights": model, "copies": engine.copies[on_gpu] * model,
        "cache": cache_of(shape, rows=rows, longest=longest_of(recipe), itemsize=itemsize),
        "engine": VLLM_ELSE if on_gpu and recipe.generation.engine == "vllm" else 0.0,
    }  # fmt: skip
    return PlannedProcess(parts=parts, on_gpu=on_gpu, loading=(0.0, model if on_gpu else 0.0), file=model)
