"""What a training holds goes before the saved model is measured: weights, gradients, moments, DeepSpeed's buffers."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import nn
from transformers import Trainer


def release(trainer: Trainer) -> None:
    """Take the memory from all tensors of the trainer's models and optimisers, whoever still refers to them.

    They are not to be used again. Letting go of the trainer is not enough: the closures that made it hold the model, the model's
    hooks DeepSpeed's engine, and that the moments.
    """
    engine: Any = trainer.deepspeed
    models = [each for each in (trainer.model, vars(trainer).get("ref_model")) if isinstance(each, nn.Module)]
    held = [*(parameter for model in models for parameter in model.parameters())]
    if engine is not None:
        held += _tensors(vars(engine.optimizer)) if engine.optimizer is not None else []
        held += _tensors(engine.basic_optimizer.state) if engine.basic_optimizer is not None else []
    for tensor in held:
        tensor.grad = None
        # DeepSpeed adds ds_tensor, this rank's share, to the parameters that it cuts.
        for one in (tensor, vars(tensor).get("ds_tensor")):
            if one is not None:
                one.data = torch.empty(0, dtype=one.dtype, device=one.device)
    del held
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Those within dicts, lists, sets and dataclasses; results of operations that autograd recorded are left out."""
    if isinstance(value, torch.Tensor):
        if value.is_leaf:
            yield value
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from _tensors(key)
            yield from _tensors(each)
    elif isinstance(value, (list, tuple, set)):
        for each in value:
            yield from _tensors(each)
    elif is_dataclass(value) and not isinstance(value, type):  # DeepSpeed's buckets
        yield from _tensors(vars(value))
