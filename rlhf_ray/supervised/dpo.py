"""Direct preference optimisation on one rank: the reward model's pairs in, a Hugging Face folder and its figures out.

The reference stays in memory beside the model and reads each microbatch after it. Computing its log-probs beforehand
would save a model's memory, but the two would read differently padded batches: in bfloat16 the log-ratios of untrained
weights would not be 0, and a resumed stage would have to compute them all again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from typing import cast

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import ModelOutput
from trl import DPOConfig as TrlDpoConfig
from trl import DPOTrainer

from rlhf_ray.algorithms.logprobs import selected_logprobs
from rlhf_ray.config import DpoConfig, Recipe
from rlhf_ray.data.role_files import COLUMNS, read_role
from rlhf_ray.errors import UserError
from rlhf_ray.models.frozen import hold_frozen
from rlhf_ray.models.load import build_causal_lm, disable_dropout, fast_attention, load_causal_lm, to_device
from rlhf_ray.models.positions import check_positions
from rlhf_ray.models.tokenizer import load_tokenizer
from rlhf_ray.models.trained_part import train_only_part
from rlhf_ray.runs.run_folder import RunFolder, start_model
from rlhf_ray.supervised.dpo_metrics import dpo_figures
from rlhf_ray.supervised.reward_metrics import numbered
from rlhf_ray.supervised.rows import IGNORED, TokenRows, dpo_rows
from rlhf_ray.supervised.stage import MeasuringJob, StageJob, device_of, measure_stage, train_stage
from rlhf_ray.supervised.stage_trainer import StageTrainer, padding_of, training_arguments
from rlhf_ray.training.forward import response_logprobs

DPO_SEED = 4000  # added to the recipe's: another order of the pairs than the reward model's


@dataclass
class HeadOutput(ModelOutput):
    """What TRL reads of a forward pass: log-probs [B, S - 1], 0 where there is no label, and inputs of its metrics."""

    log_probs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    mean_logits: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None


class Dpo(StageTrainer, DPOTrainer):
    """TRL's trainer on rows that are tokenised already; on CPUs with the plain head."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.args.device.type == "cpu":
            for model in (self.model, self.accelerator.unwrap_model(self.ref_model)):
                use_plain_head(cast(PreTrainedModel, model))  # neither is in a wrapper here

    def _prepare_dataset(self, dataset, *_args, **_kwargs):
        return dataset


def train_dpo(recipe: Recipe, folder: RunFolder, stage: str) -> dict:
    """The stage "dpo" on this rank -> its summary (see `stage.train_stage`)."""
    config = recipe.section(stage)
    assert isinstance(config, DpoConfig)
    train, tokenizer = _read(folder, "reward_train"), load_tokenizer(folder.tokenizer, recipe.model.trust_remote_code)
    max_length, start = recipe.max_length_of(stage), partial(_start, recipe, folder, tokenizer, device_of(config))
    held_out = _read(folder, "reward_eval")
    held_out = held_out.select(range(min(config.eval_rows, len(held_out))))
    held_out = dpo_rows(tokenizer, held_out, max_length=max_length)  # what can't be measured is told of before the training

    def measure(trained: PreTrainedModel, dtype: torch.dtype) -> dict:
        reference = start().requires_grad_(False)
        return heldout_figures(trained, to_device(reference, device_of(config)), held_out, config, dtype=dtype)

    measuring = MeasuringJob(
        recipe=recipe, stage=stage, target=folder.stage(stage), config=config, measure=measure,
        load=lambda saved: fast_attention(load_causal_lm(saved, None, recipe.model.trust_remote_code), device_of(config)),
    )  # fmt: skip
    job = _training(recipe, folder, stage, config, tokenizer, dpo_rows(tokenizer, train, max_length=max_length), start)
    jobs = [job]
    del job  # `train_stage` is to hold the only reference
    return measure_stage(train_stage(jobs.pop()), measuring)


def _training(
    recipe: Recipe,
    folder: RunFolder,
    stage: str,
    config: DpoConfig,
    tokenizer: PreTrainedTokenizerBase,
    rows: TokenRows,
    start: Callable[[], PreTrainedModel],
) -> StageJob:
    seed, model = recipe.seed + DPO_SEED, start()
    check_positions(model.config, recipe.max_length_of(stage), f"{stage}.max_length")
    train_only_part(
        model, lora=config.lora, freeze_layers=config.freeze_layers, seed=seed,
        gradient_checkpointing=config.gradient_checkpointing,
    )  # fmt: skip

    def trainer(dataset: Dataset, stage_folder, dtype) -> StageTrainer:
        reference = start()  # before the arguments: after them ZeRO-3 splits every loaded model over the ranks
        hold_frozen(model, dtype)
        hold_frozen(reference.requires_grad_(False), dtype)
        args = training_arguments(
            TrlDpoConfig, stage, config, stage_folder, dtype=dtype, seed=seed, padding=padding_of(model),
            beta=config.beta, disable_dropout=True, **loss_arguments(config),
        )  # fmt: skip
        return Dpo(model=model, ref_model=reference, args=args, train_dataset=dataset, processing_class=tokenizer)

    return StageJob(
        recipe=recipe, stage=stage, target=folder.stage(stage), config=config, seed=seed, tokenizer=tokenizer, rows=rows,
        trainer=trainer, start=start,
    )  # fmt: skip


def use_plain_head(model: PreTrainedModel) -> None:
    """Compute log-probs from the logits where TRL's trainer asks `model` for its fused head.

    That head saves the logits' memory; without Triton, on a CPU, a step of the demo's model takes 1.5 times as long with it.
    TRL reads the other fields for metrics that are not logged here (entropy, mean logits, top-1 accuracy).
    """
    forward = model.forward

    @wraps(forward)
    def plain_forward(*args, labels: torch.Tensor | None = None, fused_lm_head: bool = False, **kwargs):
        if not fused_lm_head:
            return forward(*args, labels=labels, **kwargs)
        assert labels is not None  # what the head is for
        outputs, labels = forward(*args, **kwargs), labels[:, 1:]
        found = selected_logprobs(outputs.logits[:, :-1], labels.clamp(min=0), temperature=1.0)
        logprobs = torch.where(labels == IGNORED, 0.0, found)
        zeros = torch.zeros_like(logprobs, requires_grad=False)
        return HeadOutput(
            log_probs=logprobs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(), aux_loss=outputs.get("aux_loss")
        )

    model.forward = plain_forward


def loss_arguments(config: DpoConfig) -> dict:
    """The recipe's loss in TRL's arguments.

    TRL smooths only its "robust" loss. With x = beta * margin and S = -log sigmoid(x), robust is
    R = S - eps / (1 - 2 eps) * x and cDPO is S + eps * x = (2 - 2 eps) S - (1 - 2 eps) R.
    """
    eps = config.label_smoothing
    if eps == 0:
        return {"loss_type": [config.loss]}
    return {
        "loss_type": ["sigmoid", "robust"], "loss_weights": [2 - 2 * eps, -(1 - 2 * eps)], "label_smoothing": eps,
    }  # fmt: skip


def heldout_figures(
    model: PreTrainedModel, reference: PreTrainedModel, rows: TokenRows, config: DpoConfig, *, dtype: torch.dtype
) -> dict:
    """The figures of `dpo_metrics` on held-out pairs."""
    sides = {}
    for side in ("chosen", "rejected"):
        ours, theirs = (
            reply_logprobs(one, rows.dataset, f"{side}_ids", dtype=dtype, batch_size=config.microbatch_size)
            for one in (model, reference)
        )
        sides[f"{side}_logratios"] = ours - theirs
        sides[f"{side}_lengths"] = np.array([len(ids) for ids in rows.dataset[:][f"{side}_ids"]])
    figures = dpo_figures(
        **sides, beta=config.beta, loss=config.loss, label_smoothing=config.label_smoothing,
        groups=numbered([tuple(ids) for ids in rows.dataset[:]["prompt_ids"]]),
    )  # fmt: skip
    return {"eval_rows": len(rows.dataset), **figures}


def reply_logprobs(
    model: PreTrainedModel, rows: Dataset, column: str, *, dtype: torch.dtype, batch_size: int
) -> np.ndarray:
    """Log-prob of each row's reply given its prompt, summed over its tokens: float64 [N]."""
    prompts, replies = [], []
    for prompt, reply in zip(rows[:]["prompt_ids"], rows[:][column], strict=True):
        # Nothing stands before the first token of a row without prompt and BOS, so nothing predicts it.
        known = max(len(prompt), 1)
        ids = np.array(prompt + reply, np.int32)
        prompts.append(ids[:known])
        replies.append(ids[known:])
    sums = np.zeros(len(replies))
    order = sorted((i for i, ids in enumerate(replies) if len(ids)), key=lambda i: len(prompts[i]) + len(replies[i]))
    logprobs = response_logprobs(
        model, [prompts[i] for i in order], [replies[i] for i in order], compute_dtype=dtype, microbatch_size=batch_size
    )
    sums[order] = [row.sum(dtype=np.float64) for row in logprobs]
    return sums


def _start(
    recipe: Recipe, folder: RunFolder, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> PreTrainedModel:
    """The SFT model, or the recipe's where there is no SFT stage: the same start as PPO's policy."""
    if recipe.sft is None:
        model = build_causal_lm(recipe.model, tokenizer, recipe.seed)
    else:
        model = load_causal_lm(start_model(recipe, folder), None, recipe.model.trust_remote_code)
    disable_dropout(model)
    model.config.response_stops = list(recipe.generation.stop)  # as the PPO stage writes it
    return fast_attention(model, device)


def _read(folder: RunFolder, role: str) -> Dataset:
    data = read_role(folder, role)
    missing = set(COLUMNS["pairs"]) - set(data.column_names)
    if missing:
        raise UserError(
            f"dpo learns from pairs, but {folder.data(role)} has no column {', '.join(sorted(missing))} "
            f"(it has {', '.join(data.column_names)}); give chosen and rejected replies in a new run folder, or set dpo: null"
        )
    return data
