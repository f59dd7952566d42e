"""One supervised stage on one rank: train, save, measure. The same for SFT, fluency, reward model, judge and DPO.

Training and measuring are two calls, so that of the first nothing is left when the second begins: a run of AdamW holds four times
the weights, and DeepSpeed's buffers.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from rlhf_ray.config import Recipe, TrainConfig
from rlhf_ray.models.card import model_card
from rlhf_ray.models.load import to_device
from rlhf_ray.models.save import save_model
from rlhf_ray.models.trained_part import is_adapter, load_trained
from rlhf_ray.runs.run_folder import StageFolder
from rlhf_ray.runs.storage import write_atomically
from rlhf_ray.supervised.rows import TokenRows, training_order
from rlhf_ray.supervised.stage_trainer import StageTrainer, run_training, trained_weights
from rlhf_ray.training.agreement import rank
from rlhf_ray.training.precision import resolve_precision
from rlhf_ray.training.release import release_engine


@dataclass(frozen=True, kw_only=True)
class StageJob:
    """What distinguishes the training of one stage from another. It holds the model."""

    recipe: Recipe
    stage: str
    target: StageFolder  # where the result goes: the stage's folder, or that of a member of its ensemble
    config: TrainConfig
    seed: int
    tokenizer: PreTrainedTokenizerBase
    rows: TokenRows
    trainer: Callable[..., StageTrainer]  # (dataset in training order, stage folder, compute dtype) -> trainer
    start: Callable[[], PreTrainedModel]  # the model before training, once more: what did not train is saved with all its digits


@dataclass(frozen=True, kw_only=True)
class MeasuringJob:
    """What distinguishes how the results are measured. It must not hold the model that trained."""

    recipe: Recipe
    stage: str
    target: StageFolder
    config: TrainConfig
    load: Callable[[Path], PreTrainedModel]  # the saved folder -> the model that is measured
    measure: Callable[[PreTrainedModel, torch.dtype], dict]  # held-out figures


def device_of(config: TrainConfig) -> torch.device:
    return torch.device("cuda" if config.gpus_per_worker > 0 else "cpu")


def train_stage(job: StageJob) -> dict:
    """Train, then write model/ and return the summary so far on rank 0; {"ended_by": "stop"} where it was asked to stop.

    Other ranks return {} after training. The caller keeps no reference to the job: see `measure_stage`.
    """
    config, folder = job.config, job.target
    dtype = resolve_precision(config.precision, device_of(config))
    by_epochs = round(config.epochs * len(job.rows.lengths))
    wanted = config.max_steps * config.batch_size if config.max_steps > 0 else by_epochs
    order = training_order(job.rows.lengths, batch_size=config.batch_size, rows=wanted, seed=job.seed)
    tokens_per_step = job.rows.lengths[order].reshape(-1, config.batch_size).sum(1)
    dataset = job.rows.dataset.select(order)
    outcome, trainer = run_training(
        lambda: job.trainer(dataset, folder, dtype), stage=job.stage, config=config, folder=folder,
        tracking=job.recipe.tracking, tokens_per_step=tokens_per_step,
    )  # fmt: skip
    if outcome.ended_by == "stop":
        return {"ended_by": "stop", "steps": outcome.steps}
    weights, model = trained_weights(trainer), cast(PreTrainedModel, trainer.model)  # DeepSpeed's wrapper is trainer.deepspeed
    summary = {
        "steps": outcome.steps, "planned_steps": len(tokens_per_step), "ended_by": outcome.ended_by,
        "train_seconds": round(outcome.seconds, 2), "loss": outcome.last_loss,
        "rows": len(job.rows.lengths), "rows_cut": job.rows.cut,
        **({"rows_tied": job.rows.ties} if job.rows.ties else {}),
        "tokens": int(np.sum(tokens_per_step[: outcome.steps])),
        **_sizes(model, sharded=config.zero_stage == 3),
        "precision": str(dtype).removeprefix("torch."),
    }  # fmt: skip
    whole = config.zero_stage < 3 and config.lora is None and config.freeze_layers == 0
    if whole and rank() == 0:
        save_model(model, job.tokenizer, folder.model, model_card(job.recipe, job.stage, summary))
    release_engine(trainer.deepspeed)
    del trainer, model
    # Under ZeRO-3 transformers would split every model that this rank loads from here on over all ranks.
    unset_hf_deepspeed_config()
    if rank() != 0:
        return {}
    if not whole:
        gc.collect()  # the trainer is full of cycles
        saved = job.start()
        load_trained(saved, weights, lora=config.lora, freeze_layers=config.freeze_layers)
        save_model(saved, job.tokenizer, folder.model, model_card(job.recipe, job.stage, summary))
    return summary


def measure_stage(summary: dict, job: MeasuringJob) -> dict:
    """The summary of `train_stage`, where it trained to its end and this is rank 0, with the held-out figures of what it saved."""
    gc.collect()  # trainer and model
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if not summary or summary["ended_by"] == "stop":
        return summary
    started, device = time.monotonic(), device_of(job.config)
    trained = job.load(job.target.model)
    trained.requires_grad_(False)  # autocast keeps copies of weights that need gradients
    figures = job.measure(to_device(trained, device), resolve_precision(job.config.precision, device))
    summary = summary | figures
    write_atomically(job.target.model / "README.md", model_card(job.recipe, job.stage, summary))
    return summary | {"measure_seconds": round(time.monotonic() - started, 2)}


def _sizes(model: PreTrainedModel, sharded: bool) -> dict:
    """How many weights the saved model has, and how many trained, if not all."""
    # DeepSpeed adds ds_numel to the parameters that it shards.
    counts = [
        (name, cast(Any, p).ds_numel if sharded else p.numel(), p.requires_grad) for name, p in model.named_parameters()
    ]
    sizes = {"parameters": sum(count for name, count, _ in counts if not is_adapter(name))}
    trained = sum(count for _, count, trains in counts if trains)
    return sizes if trained == sizes["parameters"] else sizes | {"trained_parameters": trained}
