"""Linear layers that keep their weights in the order in which the CPU's kernel for bfloat16 products reads them.

Without it the kernel puts a weight into that order on every call, which for the few rows of a decode step takes a good part of
the product's time, and a feed-forward's activation is a pass of its own over the widest numbers of a block (measured:
results/bench/trials.py). The price is a second copy of the weights, or none where they never change again.
"""

from __future__ import annotations

import ctypes

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import GELUTanh, NewGELUActivation, SiLUActivation
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP
from transformers.pytorch_utils import Conv1D

from rlhf_ray.models.activation import SigmoidGELU

ROWS = 64  # that the order is chosen for; it is the faster one from 1 row to hundreds
NOTHING, GELU, SILU = ("none", [], ""), ("gelu", [], "tanh"), ("swish", [], "")  # the kernel's names


class PackedForward:
    """The forward of a linear layer where there is no gradient and products are in bfloat16; else the layer's own.

    It packs anew when the weight has changed, which torch counts. frozen: it never does, and the weight itself is given up.
    """

    def __init__(self, layer: nn.Linear | Conv1D, *, frozen: bool):
        self.layer = layer
        self._of: tuple[torch.Tensor, int] | None = None  # weight and version that are packed
        if frozen:
            self._pack()
            layer.weight.data = layer.weight.new_empty(0)  # tied ones are not frozen, so this is nobody else's
            self._of = layer.weight, layer.weight._version

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(x, NOTHING) if packs(x) else type(self.layer).forward(self.layer, x)

    def run(self, x: torch.Tensor, activation: tuple) -> torch.Tensor:
        """activation(x W + b) in one kernel."""
        return torch.ops.mkldnn._linear_pointwise(x.bfloat16(), *self._weights(), *activation)

    def times(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """(x W + b) * other in one kernel."""
        return torch.ops.mkldnn._linear_pointwise.binary(x.bfloat16(), other, *self._weights(), "mul")

    def _weights(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        weight, bias = self.layer.weight, self.layer.bias
        if self._of is None or self._of[0] is not weight or self._of[1] != weight._version:
            self._pack()
        return self._packed, None if bias is None else bias.bfloat16()

    def _pack(self) -> None:
        weight = self.layer.weight
        straight = weight.detach().bfloat16()
        straight = straight.t() if isinstance(self.layer, Conv1D) else straight
        self._packed, self._of = torch.ops.mkldnn._reorder_linear_weight(straight, ROWS), (weight, weight._version)


class PackedFeedForward:
    """The forward of a feed-forward whose linear layers are packed: the activation, and the gate's product, in their kernels."""

    def __init__(self, module: GPT2MLP | LlamaMLP | Qwen2MLP):
        self.module = module

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        module = self.module
        if not packs(x):
            return type(module).forward(module, x)
        if isinstance(module, GPT2MLP):
            return module.dropout(module.c_proj(module.c_fc.forward.run(x, GELU)))
        return module.down_proj(module.up_proj.forward.times(x, module.gate_proj.forward.run(x, SILU)))


def packs(x: torch.Tensor) -> bool:
    """Whether a linear layer of x is a product in bfloat16 without a gradient."""
    if torch.is_grad_enabled():
        return False
    return (
        torch.get_autocast_dtype("cpu") == torch.bfloat16
        if torch.is_autocast_enabled("cpu")
        else x.dtype == torch.bfloat16
    )


def pack_linears(model: PreTrainedModel, *, frozen: bool = False, fused: bool = True) -> None:
    """Let linear layers on a CPU with a kernel for bfloat16 run packed, in place; those of classes of their own stay.

    frozen: the weights will not change, nor be read from the model, nor used with gradients: one copy is enough. A tied one
    stays. fused: activations in the kernels too, which round once less.
    """
    if model.device.type != "cpu" or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return
    tied = model.get_input_embeddings().weight
    for module in model.modules():
        if type(module) in (nn.Linear, Conv1D) and not module.weight.is_inference():
            module.forward = PackedForward(module, frozen=frozen and module.weight is not tied)
    if fused:
        for module in model.modules():
            if _can_fuse(module):
                module.forward = PackedFeedForward(module)
    if frozen:
        _let_go_of_the_rest(model)


def _let_go_of_the_rest(model: PreTrainedModel) -> None:
    """Give back what the weights that were given up stood in."""
    for parameter in model.parameters():
        # A loaded model's weights are views into its file, which stays in memory, all that was read, while one of them does.
        parameter.data = parameter.data.clone()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # glibc returns memory between other memory only when it is asked to
        trim(0)


def _can_fuse(module: nn.Module) -> bool:
    if type(module) is GPT2MLP:
        linears, known = (
            (module.c_fc, module.c_proj),
            isinstance(module.act, (SigmoidGELU, NewGELUActivation, GELUTanh)),
        )
    elif type(module) in (LlamaMLP, Qwen2MLP):
        linears, known = (
            (module.gate_proj, module.up_proj, module.down_proj),
            isinstance(module.act_fn, (nn.SiLU, SiLUActivation)),
        )
    else:
        return False
    return known and all(isinstance(layer.forward, PackedForward) for layer in linears)
