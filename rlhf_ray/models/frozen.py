"""Weights that don't train, kept in the dtype that they are multiplied in."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


def hold_frozen(module: nn.Module, compute_dtype: torch.dtype) -> None:
    """Keep the weights of frozen linear layers in `compute_dtype`, in place. For modules that run under autocast to it.

    No result changes: autocast rounds these weights to the same digits in each pass, and keeps both copies meanwhile. Weights that
    are read otherwise stay as they are: embeddings (and an output layer tied to them), norms, and layers of one's own class, such
    as a score head in float32. Call it after all that runs the module without autocast (`training.packing.pack`).
    """
    if compute_dtype == torch.float32:
        return
    looked_up = {id(layer.weight) for layer in module.modules() if isinstance(layer, nn.Embedding)}
    for layer in module.modules():
        if type(layer) in (nn.Linear, Conv1D) and not layer.weight.requires_grad and id(layer.weight) not in looked_up:
            weight = cast(nn.Parameter, layer.weight)
            weight.data = weight.data.to(compute_dtype)
