"""A supervised stage's options -> DeepSpeed's configuration. Pure: no deepspeed, no torch.distributed."""

from __future__ import annotations

from typing import Any

import torch

MAX_GRAD_NORM = 1.0


def deepspeed_config(
    *,
    zero_stage: int,
    compute_dtype: torch.dtype,
    microbatch_size: int,
    accumulation_steps: int,
    workers: int,
    on_gpu: bool = False,
    max_grad_norm: float = MAX_GRAD_NORM,
    offload_optimizer: bool = False,
    offload_param: bool = False,
) -> dict[str, Any]:
    """The dictionary that `deepspeed.initialize` (and Hugging Face's `deepspeed=`) takes, for CPUs and GPUs alike.

    microbatch_size: sequences per forward pass, per rank; the optimiser's batch is that times accumulation_steps
    times workers.
    bfloat16 is autocast over float32 weights, not DeepSpeed's own bf16 mode: that keeps bf16 weights and adds gradients
    up in bf16, for no gain in speed.
    """
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": microbatch_size,
        "gradient_accumulation_steps": accumulation_steps,
        "train_batch_size": microbatch_size * accumulation_steps * workers,
        "gradient_clipping": max_grad_norm,
        # torch's own AdamW comes from the trainer: DeepSpeed's would be compiled with g++ at the first start.
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": zero_stage},
        "steps_per_print": 10**9,
    }
    if compute_dtype != torch.float32:
        config["torch_autocast"] = {"enabled": True, "dtype": str(compute_dtype).removeprefix("torch.")}
    if zero_stage > 0:
        config["zero_optimization"]["overlap_comm"] = on_gpu  # on streams of their own; gloo has none
    if zero_stage == 3:
        config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    add_offload(config, offload_optimizer=offload_optimizer, offload_param=offload_param)
    return config


def add_offload(config: dict[str, Any], *, offload_optimizer: bool, offload_param: bool) -> None:
    """What stands in the host's memory, where DeepSpeed computes on a GPU: gradients and moments; a rank's weights."""
    if offload_optimizer:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        config["zero_force_ds_cpu_optimizer"] = False  # torch's own AdamW steps there; DeepSpeed's would be compiled with g++
    if offload_param:
        config["zero_optimization"]["offload_param"] = {"device": "cpu"}
