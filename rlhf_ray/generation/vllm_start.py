"""Starting vLLM in this process, for closed batches (`vllm_generation`) and for an open one (`vllm_serving`)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from rlhf_ray.errors import UserError
from rlhf_ray.generation.vllm_build import vllm_problem
from rlhf_ray.models.float_head import has_float32_head
from rlhf_ray.models.generation_memory import gpu_memory_utilization

#: Read by vLLM when it is imported or started.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # its model has to be in reach
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the threads are the actor's; other roles work on the same cores
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
#: On CPUs it would compile a handful of small functions with g++: half a minute at every start, for nothing that counts.
ENVIRONMENT_CPU = ENVIRONMENT | {"TORCHDYNAMO_DISABLE": "1"}


def check_vllm(device: torch.device) -> None:
    """UserError where no vLLM that computes there is installed."""
    problem = vllm_problem(float(device.type == "cuda"))
    if problem is not None:
        raise UserError(problem)


def start_vllm(
    folder: str | Path,
    model: PreTrainedModel,
    device: torch.device,
    *,
    longest: int,
    rows: int,
    cache: int,
    tensor_parallel: int,
    trust_remote_code: bool,
    **options: Any,
) -> Any:
    """vllm.LLM of the folder. model: the same, as Hugging Face has it, for its size and dtype. longest: tokens of a prompt with its
    response; rows: that decode at a time; cache: bytes of their keys and values; options: more of vLLM's arguments."""
    on_gpu = device.type == "cuda"
    for name, value in (ENVIRONMENT if on_gpu else ENVIRONMENT_CPU).items():
        os.environ.setdefault(name, value)
    from vllm import LLM

    return LLM(
        str(folder),
        dtype=model.dtype,
        max_model_len=longest,
        max_num_seqs=rows,
        # Said in bytes, since a share of the memory would be one of what the other roles need, too.
        kv_cache_memory_bytes=cache // tensor_parallel,
        **(_on_gpus(model, device, cache, tensor_parallel) if on_gpu else {}),
        hf_overrides={"head_dtype": "float32"} if has_float32_head(model) else {},
        generation_config="vllm",  # not the model folder's: the recipe says how responses are drawn
        trust_remote_code=trust_remote_code,
        enforce_eager=not on_gpu,  # on CPUs compiling takes a compiler, and longer than a small run
        enable_sleep_mode=on_gpu,
        seed=0,  # of draws without a seed, and there are none
        **options,
    )


def _on_gpus(model: PreTrainedModel, device: torch.device, cache: int, tensor_parallel: int) -> dict[str, Any]:
    """The share of each GPU that has to be free at the start (vLLM's default is 92 %, which other roles leave to nobody), and
    how many hold the model."""
    weights = sum(parameter.numel() for parameter in model.parameters()) * model.dtype.itemsize
    gpu = torch.cuda.get_device_properties(device).total_memory
    share = gpu_memory_utilization(weights=weights, cache=cache, tensor_parallel=tensor_parallel, gpu=gpu)
    return {"gpu_memory_utilization": share, "tensor_parallel_size": tensor_parallel}
