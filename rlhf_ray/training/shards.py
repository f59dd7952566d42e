"""A module's weights from rank 0 to all ranks, each of which keeps its share: how ZeRO-3 starts."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

GATHERED_AS = "comm_dtype"  # DeepSpeed's attribute of a parameter: the dtype that its shares travel in for a pass


def cut_into_shards(module: nn.Module, device: torch.device, options: dict[str, Any]) -> None:
    """Turn the parameters into ZeRO-3's, in place. Collective. Of whole parameters there is one at a time on `device`.

    Rank 0's values count. Those of other ranks may be without memory (on the meta device); nothing of them is read.
    options: DeepSpeed's configuration.
    """
    import deepspeed

    cutter = deepspeed.zero.Init(config_dict_or_path=options)
    seen: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # a tied one comes twice; the first of a pair keeps its id its own
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in seen:
                whole = parameter
                if parameter.is_meta:
                    whole = nn.Parameter(torch.empty_like(parameter, device=device), parameter.requires_grad)
                elif parameter.requires_grad:
                    whole.data = whole.data.float()
                whole.data = whole.data.contiguous()
                cutter._convert_to_zero_parameters([whole])
                seen[id(parameter)] = parameter, whole
            owner._parameters[name] = seen[id(parameter)][1]


def gather_in(module: nn.Module, dtype: torch.dtype) -> None:
    """Have the weights of linear layers travel in `dtype` for forward and backward passes, in place. For modules that run under
    autocast to it.

    No result changes: autocast rounds these weights to the same digits after they have arrived. Gradients add up in float32 all the
    same, and `EngineState` gathers all digits. (DeepSpeed's own autocast does this to gradients, too.)
    """
    looked_up = {id(layer.weight) for layer in module.modules() if isinstance(layer, nn.Embedding)}
    for layer in module.modules():
        if type(layer) in (nn.Linear, Conv1D):
            for parameter in layer.parameters(recurse=False):
                if id(parameter) not in looked_up:
                    vars(parameter)[GATHERED_AS] = dtype
