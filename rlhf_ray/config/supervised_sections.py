"""The supervised stages: SFT and fluency model, reward model and judge, DPO; and which part of a model trains."""

from __future__ import annotations

from typing import Literal

from pydantic import field_validator, model_validator

from rlhf_ray.config.base import Precision, Section, exact_div, option


class LoraConfig(Section):
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685): they train, the model's own weights stay as they are."""

    rank: int = option(16, "rows of A and columns of B in W + alpha / rank * B A", gt=0)
    alpha: float = option(32.0, "the adapter counts alpha / rank times", gt=0)
    target_modules: tuple[str, ...] | None = option(
        None, "ends of the names of the linear layers that get one, e.g. [q_proj, v_proj]; null: all of the body"
    )

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank

    @model_validator(mode="after")
    def _has_targets(self):
        if self.target_modules is not None and not all(self.target_modules):
            raise ValueError(
                "target_modules holds an empty name; name linear layers, or set it to null for all of them"
            )
        if self.target_modules == ():
            raise ValueError("target_modules is empty, so nothing would train; set it to null for all linear layers")
        return self


def check_trained_part(lora: LoraConfig | None, freeze_layers: int, keys: tuple[str, str]) -> None:
    """ValueError where both are set. keys: what the recipe calls the two."""
    if lora is not None and freeze_layers > 0:
        raise ValueError(
            f"{keys[0]} is set and {keys[1]} is {freeze_layers}: an adapter freezes all layers already; "
            f"set {keys[1]} to 0, or {keys[0]} to null"
        )


class TrainConfig(Section):
    """What the supervised stages (SFT, reward model, judge, fluency model, DPO) have in common."""

    learning_rate: float = option(3e-4, "peak learning rate of AdamW", gt=0)
    epochs: float = option(1.0, "passes over the data", gt=0)
    max_steps: int = option(-1, "optimiser steps; -1: as many as the epochs need", ge=-1)
    batch_size: int = option(32, "sequences per optimiser step, all workers", gt=0)
    microbatch_size: int = option(32, "sequences per forward pass, per worker", gt=0)
    max_length: int = option(256, "longest sequence in tokens", gt=1)
    warmup_ratio: float = option(0.03, "share of the steps in which the rate rises", ge=0, lt=1)
    schedule: Literal["linear", "cosine", "constant"] = option("cosine", "shape of the learning rate after the warm-up")
    weight_decay: float = option(0.0, "decoupled weight decay", ge=0)
    precision: Precision = option("auto", "auto: bfloat16 where the hardware computes in it, else float32")
    max_minutes: float | None = option(
        None,
        "end the training after this many minutes of its steps, over all resumes, with what it has; starting the workers, reading "
        "the data, and saving and measuring the model (eval_rows, normalise_samples) come on top",
        gt=0,
    )
    checkpoint_minutes: float = option(10.0, "longest time between checkpoints", gt=0)
    eval_rows: int = option(500, "held-out rows scored after training", gt=0)
    workers: int = option(1, "Ray Train workers (data-parallel ranks)", gt=0)
    cpus_per_worker: float = option(1, "CPUs reserved for each worker", gt=0)
    gpus_per_worker: float = option(0, "GPUs reserved for each worker", ge=0)
    threads: int | None = option(None, "torch threads of each worker; null: a share of the node's cores", gt=0)
    zero_stage: Literal[0, 1, 2, 3] = option(0, "DeepSpeed ZeRO stage")
    lora: LoraConfig | None = option(None, "train low-rank adapters, merged into the saved model; null: all weights")
    freeze_layers: int = option(0, "the embeddings and the first N transformer blocks do not train", ge=0)
    gradient_checkpointing: bool = option(False, "compute activations again in the backward pass: less memory, more time")

    @property
    def accumulation_steps(self) -> int:
        per_rank = exact_div(self.batch_size, self.workers, "batch_size must divide by workers")
        return exact_div(per_rank, self.microbatch_size, "batch_size / workers must divide by microbatch_size")

    @field_validator("max_steps")
    @classmethod
    def _trains_or_follows_epochs(cls, value: int) -> int:
        if value == 0:
            raise ValueError("max_steps is 0, which would train nothing; give 1 or more, or -1 for as many as the epochs need")
        return value

    @model_validator(mode="after")
    def _batches_divide(self):
        assert self.accumulation_steps > 0
        return self

    @model_validator(mode="after")
    def _trains_one_part(self):
        check_trained_part(self.lora, self.freeze_layers, ("lora", "freeze_layers"))
        return self


class SftConfig(TrainConfig):
    """Supervised fine-tuning (TRL's SFTTrainer). Also the form of the separately seeded fluency model."""

    packing: bool = option(False, "fill sequences of max_length with several texts (plain text only)")


class RewardConfig(TrainConfig):
    """A reward model (TRL's RewardTrainer). Also the form of the independent judge."""

    objective: Literal["pairs", "scores"] = option("pairs", "Bradley-Terry on pairs, or regression to people's scores")
    base: str = option(
        "sft",
        "start from 'sft' or 'fluency' (that stage's model), 'model' (the recipe's model, before SFT) "
        "or a folder / hub name",
        min_length=1,
    )
    truncate_reply: Literal["left", "right", "drop"] = option(
        "drop", "side of a reply that is cut when its row exceeds max_length, or drop the row"
    )
    learning_rate: float = option(1e-4, "peak learning rate of AdamW", gt=0)
    schedule: Literal["linear", "cosine", "constant"] = option("linear", "shape of the learning rate after the warm-up")
    normalise_samples: int = option(
        256, "samples of the SFT model whose mean and deviation normalise the scores; 0: none", ge=0
    )
    members: int = option(1, "models trained, each with a head and a data order of its own; all score together", gt=0)
    combine: Literal["mean", "worst", "mean_minus_std"] = option(
        "mean", "score of an ensemble: mean of its members, their lowest, or mean - combine_std * deviation"
    )
    combine_std: float = option(1.0, "deviations that mean_minus_std subtracts", ge=0)

    @model_validator(mode="after")
    def _an_ensemble_has_members(self):
        if self.members == 1 and self.combine != "mean":
            raise ValueError(
                f"combine is '{self.combine}' and members is 1: there is nothing to combine; set members to 2 or more, "
                "or combine to mean"
            )
        return self

    @property
    def starts_within_run(self) -> bool:
        """Whether `base` is one of the run's own models, which share the run's tokenizer."""
        return self.base in ("sft", "fluency", "model")


class DpoConfig(TrainConfig):
    """Direct preference optimisation on the reward model's own pairs (TRL's DPOTrainer), from the SFT model."""

    beta: float = option(
        0.1, "weight of the KL to the SFT model, as ppo.kl_coef in the objective that both maximise; IPO's tau", gt=0
    )
    loss: Literal["sigmoid", "ipo"] = option(
        "sigmoid", "sigmoid: DPO's logistic loss; ipo: squared distance of the log-ratios per token from 1 / (2 beta)"
    )
    label_smoothing: float = option(
        0.0, "share of the pairs taken to be labelled the wrong way round (cDPO); with loss sigmoid only", ge=0, lt=0.5
    )
    max_length: int | None = option(  # pyright: ignore[reportIncompatibleVariableOverride]  (`max_length_of` settles it)
        None, "longest sequence in tokens; null: reward.max_length, to which the pairs are cut already", gt=1
    )
    learning_rate: float = option(1e-5, "peak learning rate of AdamW", gt=0)
    warmup_ratio: float = option(0.1, "share of the steps in which the rate rises", ge=0, lt=1)
    schedule: Literal["linear", "cosine", "constant"] = option("linear", "shape of the learning rate after the warm-up")

    @model_validator(mode="after")
    def _smoothing_fits(self):
        if self.label_smoothing > 0 and self.loss == "ipo":
            raise ValueError(
                f"dpo.label_smoothing is {self.label_smoothing:g}, but dpo.loss ipo has no smoothed form; "
                "set label_smoothing to 0 or loss to sigmoid"
            )
        return self
