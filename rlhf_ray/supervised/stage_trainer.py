"""What the SFT, reward and DPO trainers share: arguments, learning rate, metrics, checkpoints, time limit, stopping.

`run_training` is called on every rank of an existing process group and returns on all of them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback

from rlhf_ray.config import TrackingConfig, TrainConfig
from rlhf_ray.errors import NotFinite
from rlhf_ray.models.finite_weights import REMEDY, first_bad
from rlhf_ray.models.positions import positions_of
from rlhf_ray.runs.elsewhere import arrive_at
from rlhf_ray.runs.metrics import MetricsWriter
from rlhf_ray.runs.run_folder import StageFolder
from rlhf_ray.supervised.checkpoints import Checkpoint, newest_complete, step_folder
from rlhf_ray.supervised.learning_rate import progress_of, rate_factor
from rlhf_ray.supervised.resumable import ResumableTrainer
from rlhf_ray.training.agreement import from_rank_zero, rank, world_size
from rlhf_ray.training.deepspeed_config import MAX_GRAD_NORM, deepspeed_config
from rlhf_ray.training.finite_ranks import check_weights

# Few different widths: CPU kernels are built and cached for each shape, and a cache for all lengths grows to gigabytes.
PAD_MULTIPLE = 16
#: what the trainers log -> our name
LOGGED = {"loss": "loss", "learning_rate": "learning_rate", "grad_norm": "grad_norm", "accuracy": "accuracy",
          "margin": "margin", "mean_reward": "score_mean",
          # of DPO: an implicit reward is beta * (logprob - ref_logprob), a log-prob that of a whole reply
          "rewards/accuracies": "accuracy", "rewards/margins": "margin",
          "rewards/chosen": "reward_chosen", "rewards/rejected": "reward_rejected",
          "logps/chosen": "logprob_chosen", "logps/rejected": "logprob_rejected"}  # fmt: skip


def padding_of(model: PreTrainedModel) -> int:
    """The multiple that batches are padded to: 16, or less where 16 does not divide the model's positions."""
    positions = positions_of(model.config)
    return PAD_MULTIPLE if positions is None else math.gcd(PAD_MULTIPLE, positions)


@dataclass(kw_only=True)
class Clock:
    """Seconds of training, over all resumes, as rank 0 measured them; ranks read the same number after each step."""

    total_steps: int
    limit_s: float | None
    elapsed_s: float = 0.0

    def progress(self, step: float) -> float:
        return progress_of(step=step, total_steps=self.total_steps, elapsed_s=self.elapsed_s, limit_s=self.limit_s)

    @property
    def time_is_up(self) -> bool:
        return self.limit_s is not None and self.elapsed_s >= self.limit_s


class StageTrainer(ResumableTrainer):
    """Mixin before a TRL trainer: the learning rate follows the stage's clock."""

    clock: Clock
    stage_config: TrainConfig

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        if self.lr_scheduler is None:
            # accelerate's annotation allows for its stand-in, which only DeepSpeed's own optimisers need.
            given = cast(torch.optim.Optimizer, optimizer if optimizer is not None else self.optimizer)
            self.lr_scheduler = LambdaLR(given, self.rate_factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def rate_factor(self, step: int) -> float:
        config = self.stage_config
        # The middle of the step: neither the first nor the last step is spent at a rate of 0.
        progress = self.clock.progress(step + 0.5)
        return rate_factor(progress, schedule=config.schedule, warmup_ratio=config.warmup_ratio)

    def begin(self) -> None:
        """Do what needs the optimiser and DeepSpeed's engine, before the first step."""
        self.set_rate()
        if self.stage_config.zero_stage == 0:  # above it DeepSpeed skips such a step and tells the norm
            cast(Any, self.deepspeed).basic_optimizer.register_step_pre_hook(refuse_bad_gradients)
        if world_size() == 1 and self.stage_config.zero_stage == 0:
            # With one rank it would only copy all gradients into one buffer and back.
            cast(Any, self.deepspeed).enable_backward_allreduce = False

    @property
    def elapsed_s(self) -> float:
        return self.clock.elapsed_s

    def set_rate(self) -> None:
        """Set the recipe's current learning rate: a checkpoint restores the rate that it was written with."""
        scheduler = self.lr_scheduler
        scheduler.base_lrs = [self.stage_config.learning_rate] * len(scheduler.base_lrs)
        for group in scheduler.optimizer.param_groups:
            group["lr"] = self.stage_config.learning_rate * self.rate_factor(scheduler.last_epoch)


def refuse_bad_gradients(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """NotFinite before the weights move. Gradients are reduced: every rank sees the same."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if first_bad(("", each.grad) for each in parameters if each.grad is not None) is not None:
        raise NotFinite(f"a gradient is not finite, so the step is not taken; {REMEDY}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a training ended."""

    ended_by: str  # "steps", "max_minutes" or "stop" (asked to; a checkpoint is written)
    steps: int
    seconds: float
    last_loss: float | None


def training_arguments(
    cls: type, stage: str, config: TrainConfig, folder: StageFolder,
    *, dtype: torch.dtype, seed: int, padding: int, **extra,
):  # fmt: skip
    """SFTConfig, RewardConfig or DPOConfig of TRL, with what it turns on by default (bf16, gradient checkpointing) off.

    Creating it joins this process to DeepSpeed's view of the process group.
    """
    return cls(
        output_dir=str(folder.checkpoints),
        deepspeed=deepspeed_config(
            zero_stage=config.zero_stage, compute_dtype=dtype, microbatch_size=config.microbatch_size,
            accumulation_steps=config.accumulation_steps, workers=config.workers, on_gpu=config.gpus_per_worker > 0,
            offload_optimizer=config.offload_optimizer, offload_param=config.offload_param,
        ),
        # Without it Accelerate sees a single process where there is no GPU, whatever the process group says.
        use_cpu=config.gpus_per_worker == 0,
        bf16=False,  # the DeepSpeed config says autocast
        gradient_checkpointing=False,  # `train_only_part` has told the model, where the recipe wants it
        per_device_train_batch_size=config.microbatch_size,
        gradient_accumulation_steps=config.accumulation_steps,
        num_train_epochs=1,  # the data set is all passes, in order
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        max_grad_norm=MAX_GRAD_NORM,
        optim="adamw_torch_fused",
        max_length=None,  # rows are cut already
        pad_to_multiple_of=padding,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",  # the callback asks for each
        disable_tqdm=True,
        report_to=[],
        seed=seed,
        run_name=stage,
        **extra,
    )  # fmt: skip


@dataclass
class StageCallback(TrainerCallback):
    """After each step: one line of metrics; a checkpoint when one is due; the end when time is up or STOP is there."""

    folder: StageFolder
    config: TrainConfig
    clock: Clock
    tokens_per_step: np.ndarray  # [total_steps], of all ranks
    writer: MetricsWriter | None  # rank 0 only
    device: torch.device
    begin: Callable[[], None]
    look_at_checkpoint: Callable[[], None]
    started: float = field(default_factory=time.monotonic)
    resumed_s: float = 0.0
    saved_s: float = 0.0
    stopped: bool = False
    last_loss: float | None = None
    step_s: float = 0.0

    def on_train_begin(self, args, state, control, **_):
        self.begin()
        self.started, self.resumed_s = time.monotonic(), self.clock.elapsed_s
        self.saved_s = self.resumed_s

    def on_step_end(self, args, state, control, **kwargs):
        before = self.clock.elapsed_s
        elapsed = self.resumed_s + time.monotonic() - self.started
        stop = self.folder.stop_file.exists() if rank() == 0 else False
        # Ranks must agree: one that stopped or saved alone would wait for the others for ever, and a learning rate that
        # follows each rank's own clock would let their weights drift apart.
        self.clock.elapsed_s, stop = from_rank_zero([elapsed, float(stop)], self.device)
        self.step_s = self.clock.elapsed_s - before
        self.stopped = bool(stop)
        self.look_at_checkpoint()
        due = self.clock.elapsed_s - self.saved_s >= self.config.checkpoint_minutes * 60
        if self.stopped or due:
            what = f"no checkpoint is written after step {state.global_step}"
            check_weights(kwargs["model"], what, sharded=self.config.zero_stage == 3, device=self.device)
            control.should_save = True
        if self.stopped or self.clock.time_is_up:
            control.should_training_stop = True

    def on_log(self, args, state, control, logs: Mapping[str, float] | None = None, **_):
        if logs is None or "loss" not in logs:  # the closing summary of Trainer.train
            return
        for name in ("loss", "grad_norm"):  # before a checkpoint of this step would be written; the same on all ranks
            value = logs.get(name)
            if value is not None and not math.isfinite(value):
                raise NotFinite(f"{name} of step {state.global_step} is {value}; {REMEDY}")
        self.last_loss = logs["loss"]
        if self.writer is None:
            return
        tokens = int(self.tokens_per_step[state.global_step - 1])
        self.writer.write(
            state.global_step,
            {name: logs[key] for key, name in LOGGED.items() if key in logs}
            | {
                "tokens": tokens,
                "tokens_per_s": tokens / max(self.step_s, 1e-9),
                "elapsed_s": self.clock.elapsed_s,
                "progress": self.clock.progress(state.global_step),
                "total_steps": self.clock.total_steps,
            },
        )

    def on_save(self, args, state, control, **_):
        self.saved_s = self.clock.elapsed_s


def _to_go_on_from(folder: StageFolder, config: TrainConfig) -> tuple[Path, Checkpoint] | None:
    """The newest whole checkpoint that rank 0 has, fetched where this rank has another disk. Collective."""
    found = newest_complete(folder.checkpoints, print)  # into the stage's log; the driver makes an event of it
    device = torch.device("cuda" if config.gpus_per_worker > 0 else "cpu")
    (step,) = from_rank_zero([-1.0 if found is None else float(found[1].step)], device)
    if step < 0:
        return None
    if folder.run is not None and (found is None or found[1].step != step):
        arrive_at(folder.run, step_folder(folder.checkpoints, int(step)))
        found = newest_complete(folder.checkpoints, print)
    return found


def run_training(
    build: Callable[[], StageTrainer],
    *,
    stage: str,
    config: TrainConfig,
    folder: StageFolder,
    tracking: TrackingConfig,
    tokens_per_step: np.ndarray,
) -> tuple[Outcome, StageTrainer]:
    """Train until the data or the time ends or STOP is there, from the newest whole checkpoint on."""
    found = _to_go_on_from(folder, config)
    clock = Clock(total_steps=len(tokens_per_step), limit_s=config.max_minutes and config.max_minutes * 60)
    if found is not None:
        clock.elapsed_s = found[1].elapsed_s
    trainer = build()
    trainer.clock, trainer.stage_config = clock, config
    trainer.stage, trainer.zero_stage, trainer.events, trainer.run = stage, config.zero_stage, folder.events, folder.run
    writer = _writer(folder, stage, tracking, found)
    callback = StageCallback(
        folder, config, clock, tokens_per_step, writer, device=trainer.args.device, begin=trainer.begin,
        look_at_checkpoint=trainer.look_at_checkpoint,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(callback)
    try:
        trainer.train(resume_from_checkpoint=None if found is None else str(found[0]))
    except NotFinite:  # of a later step than the one whose state is being written
        trainer.finish_checkpoint()
        raise
    trainer.finish_checkpoint()
    if callback.writer is not None:
        callback.writer.close()
    ended_by = "stop" if callback.stopped else "max_minutes" if clock.time_is_up else "steps"
    outcome = Outcome(
        ended_by=ended_by, steps=trainer.state.global_step, seconds=clock.elapsed_s, last_loss=callback.last_loss
    )
    return outcome, trainer


def trained_weights(trainer: StageTrainer) -> dict[str, torch.Tensor]:
    """What trained, whole and in float32 on the host, on rank 0: by its name in the plain model; an adapter's is <layer>.lora_A or
    .lora_B. Collective."""
    state, found = trainer.engine_state(), dict[str, torch.Tensor]()
    for name, parameter in state.trained():
        with state.gathered(parameter):
            if rank() == 0:
                copy = trainer.stage_config.zero_stage == 3  # the gathered weight is gone after its turn
                found[name.removesuffix(".default.weight")] = parameter.detach().to("cpu", torch.float32, copy=copy)
    return found


def _writer(folder: StageFolder, stage: str, tracking: TrackingConfig, found) -> MetricsWriter | None:
    if rank() != 0:
        return None
    return MetricsWriter(
        folder.metrics,
        folder.path / "tensorboard" if tracking.tensorboard else None,
        tracking.wandb,
        tracking.mlflow,
        resume_step=0 if found is None else found[1].step,
        run_name=_run_name(folder, stage),
    )


def _run_name(folder: StageFolder, stage: str) -> str:
    if folder.stage is None:
        return f"{folder.path.parent.name}-{stage}"
    return f"{folder.stage.parent.name}-{stage}-{folder.path.name}"
