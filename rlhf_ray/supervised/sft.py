"""Supervised fine-tuning on one rank: prepared text in, a Hugging Face folder and held-out perplexity out.

Also trains the separately seeded fluency model. The process group exists already (`actors.supervised` makes it).
"""

from __future__ import annotations

import math
import sys
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig as TrlSftConfig
from trl import SFTTrainer

from rlhf_ray.config import Recipe, SftConfig
from rlhf_ray.data.role_files import has_role, read_role
from rlhf_ray.errors import NotFinite
from rlhf_ray.models.frozen import hold_frozen
from rlhf_ray.models.load import build_causal_lm, fast_attention, load_causal_lm
from rlhf_ray.models.positions import check_positions
from rlhf_ray.models.tokenizer import load_tokenizer, pad_id
from rlhf_ray.models.trained_part import train_only_part
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.supervised.lines import LineLoss
from rlhf_ray.supervised.rows import IGNORED, TokenRows, packed_rows, padded, sft_rows
from rlhf_ray.supervised.stage import MeasuringJob, StageJob, device_of, measure_stage, train_stage
from rlhf_ray.supervised.stage_trainer import StageTrainer, padding_of, training_arguments

FLUENCY_SEED = 1000  # the fluency model must not share the SFT model's initialisation or data order


class Sft(StageTrainer, SFTTrainer):
    """TRL's trainer; on CPUs with the plain loss, on packed lines where the model can read them.

    TRL computes the loss in a fused head that saves the logits' memory and reports entropy. Without Triton it takes
    half of a step's time on a CPU and forms the logits anyway.
    """

    line_loss: LineLoss | None = None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.args.device.type != "cpu" or return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.line_loss is not None:
            total = self.line_loss.summed(model, inputs)
        else:
            given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            total = summed_loss(model(**given, use_cache=False).logits, inputs["labels"])
        # num_items_in_batch counts the labels of all ranks and microbatches; DeepSpeed averages over ranks.
        assert num_items_in_batch is not None, "the trainer counts them"
        return total / num_items_in_batch * self.accelerator.num_processes


def train_sft(recipe: Recipe, folder: RunFolder, stage: str) -> dict:
    """The stage "sft" or "fluency" on this rank -> its summary (see `stage.train_stage`)."""
    config = recipe.section(stage)
    assert isinstance(config, SftConfig)
    tokenizer = load_tokenizer(folder.tokenizer, trust_remote_code=recipe.model.trust_remote_code)

    def measure(trained: PreTrainedModel, dtype: torch.dtype) -> dict:
        if not has_role(folder, "sft_eval"):
            return {}
        held_out = read_role(folder, "sft_eval")
        held_out = held_out.select(range(min(config.eval_rows, len(held_out))))
        held_out = sft_rows(tokenizer, held_out, max_length=config.max_length)
        return heldout_loss(trained, tokenizer, held_out, dtype=dtype, batch_size=config.microbatch_size)

    measuring = MeasuringJob(
        recipe=recipe, stage=stage, target=folder.stage(stage), config=config, measure=measure,
        load=lambda saved: load_causal_lm(saved, None, recipe.model.trust_remote_code),
    )  # fmt: skip
    return measure_stage(train_stage(_training(recipe, folder, stage, config, tokenizer)), measuring)


def _training(
    recipe: Recipe, folder: RunFolder, stage: str, config: SftConfig, tokenizer: PreTrainedTokenizerBase
) -> StageJob:
    seed = recipe.seed + (FLUENCY_SEED if stage == "fluency" else 0)
    start = partial(build_causal_lm, recipe.model, tokenizer, seed)
    model = fast_attention(start(), device_of(config))
    check_positions(model.config, config.max_length, f"{stage}.max_length")
    train_only_part(
        model, lora=config.lora, freeze_layers=config.freeze_layers, seed=seed,
        gradient_checkpointing=config.gradient_checkpointing,
    )  # fmt: skip
    texts = read_role(folder, "sft_train")
    rows = (
        packed_rows(tokenizer, texts, max_length=config.max_length, seed=seed)
        if config.packing
        else sft_rows(tokenizer, texts, max_length=config.max_length)
    )

    def trainer(dataset, stage_folder, dtype) -> StageTrainer:
        args = training_arguments(
            TrlSftConfig, stage, config, stage_folder, dtype=dtype, seed=seed, padding=padding_of(model),
            dataset_kwargs={"skip_prepare_dataset": True},
        )  # fmt: skip
        made = Sft(model=model, args=args, train_dataset=dataset, processing_class=tokenizer)
        if device_of(config).type == "cpu" and not config.packing:
            made.line_loss = LineLoss.of(model)
        hold_frozen(model, dtype)
        return made

    return StageJob(
        recipe=recipe, stage=stage, target=folder.stage(stage), config=config, seed=seed, tokenizer=tokenizer, rows=rows,
        trainer=trainer, start=start,
    )  # fmt: skip


@torch.no_grad()
def heldout_loss(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: TokenRows, *, dtype: torch.dtype, batch_size: int
) -> dict:
    """Mean nats per token over the labelled tokens of all rows, and its exponential. NotFinite where there is none."""
    device = next(model.parameters()).device
    order = np.argsort(rows.lengths, kind="stable")
    total, tokens = 0.0, 0
    for start in range(0, len(order), batch_size):
        batch = rows.dataset[order[start : start + batch_size]]
        ids, mask = padded(batch["input_ids"], pad_id(tokenizer), padding_of(model))
        labels, _ = padded(batch["labels"], IGNORED, padding_of(model))
        ids, mask, labels = ids.to(device), mask.to(device), labels.to(device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        total += float(summed_loss(logits, labels))
        tokens += int((labels[:, 1:] != IGNORED).sum())
    loss = total / tokens
    if not math.isfinite(loss):
        raise NotFinite(
            f"the loss of the trained model on held-out text is {loss}; delete the stage's folder and train again with a lower "
            "learning_rate, or with precision: float32"
        )
    return {"eval_rows": len(rows.dataset), "eval_tokens": tokens, "eval_loss": loss, "eval_perplexity": perplexity(loss)}


def perplexity(loss: float) -> float | None:
    """exp(loss); None where that is beyond a double."""
    return math.exp(loss) if loss < math.log(sys.float_info.max) else None


def summed_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Nats of the labels [B, S], each under the logits [B, S, V] of the position before it; IGNORED ones count 0."""
    flat = logits[:, :-1].reshape(-1, logits.shape[-1]).float()
    return F.cross_entropy(flat, labels[:, 1:].reshape(-1), ignore_index=IGNORED, reduction="sum")
