"""Linear layers that keep their weights in the order in which the CPU's kernel for bfloat16 products reads them.

Without it the kernel puts a weight into that order on every call, which for the few rows of a decode step takes a good part of
the product's time, and a feed-forward's activation is a pass of its own over the widest numbers of a block (measured:
results/bench/trials.py). The price is a second copy of the weights, or none where they never change again.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import GELUTanh, NewGELUActivation, SiLUActivation
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP
from transformers.pytorch_utils import Conv1D

from rlhf_ray.kernels import kernel, library
from rlhf_ray.models.activation import SigmoidGELU

ROWS = 64  # that the order is chosen for; it is the faster one from 1 row to hundreds
FEW_ROWS = 256  # up to these, the product in C is the faster one
NOTHING, GELU, SILU, TIMES = range(4)  # what follows a product, in the same kernel; numbered as in kernels/linear.c
NAMES = {NOTHING: ("none", [], ""), GELU: ("gelu", [], "tanh"), SILU: ("swish", [], "")}  # torch's


class PackedForward:
    """The forward of a linear layer where there is no gradient and products are in bfloat16; else the layer's own.

    It packs anew when the weight has changed, which torch counts. frozen: it never does, and the weight itself is given up.
    tiled: where the processor has a matrix unit, packed for products of few rows in C; many rows read the weight as it is.
    """

    def __init__(self, layer: nn.Linear | Conv1D, *, frozen: bool, tiled: bool = False):
        self.layer = layer
        self.outputs, inputs = reversed(layer.weight.shape) if isinstance(layer, Conv1D) else layer.weight.shape
        self.tiled = tiled and inputs % 32 == 0 and has_tiles()
        self._of: tuple[torch.Tensor, int] | None = None  # weight and version that are packed
        self._packed: torch.Tensor | None = None
        if frozen:
            self._weight()
            layer.weight.data = layer.weight.new_empty(0)  # tied ones are not frozen, so this is nobody else's
            self._of = layer.weight, layer.weight._version

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(x, NOTHING) if packs(x) else type(self.layer).forward(self.layer, x)

    def run(self, x: torch.Tensor, after: int, other: torch.Tensor | None = None) -> torch.Tensor:
        """x W + b, then the activation, or times the other, in one kernel."""
        x, bias = x.bfloat16(), self.layer.bias
        bias, inputs = None if bias is None else bias.bfloat16(), x.shape[-1]
        product = kernel("linear", x, bias, other) if self.tiled and x.numel() <= FEW_ROWS * inputs else None
        if product is not None:
            result = x.new_empty(*x.shape[:-1], self.outputs)
            product(x, self._weight(), bias, other, result, x.numel() // inputs, inputs, self.outputs, after)
            return result
        weight = self._straight() if self.tiled else self._weight()
        if after == TIMES:
            return torch.ops.mkldnn._linear_pointwise.binary(x, other, weight, bias, "mul")
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, *NAMES[after])

    def _straight(self) -> torch.Tensor:
        """[outputs, inputs]"""
        weight = self.layer.weight.detach().bfloat16()
        return weight.t() if isinstance(self.layer, Conv1D) else weight

    def _weight(self) -> torch.Tensor:
        weight = self.layer.weight
        if self._of is None or self._of[0] is not weight or self._of[1] != weight._version:
            straight = self._straight()
            if self.tiled:
                self._packed = _tiles(straight, self._packed)
            else:
                self._packed = torch.ops.mkldnn._reorder_linear_weight(straight, ROWS)
            self._of = weight, weight._version
        return self._packed


def _tiles(weight: torch.Tensor, tiles: torch.Tensor | None = None) -> torch.Tensor:
    """[N, K] -> [N / 16, K / 32] tiles of 16 pairs of inputs x 16 outputs, with outputs of zeros up to a multiple of 32.

    tiles: earlier ones, to be written over.
    """
    outputs, inputs = weight.shape
    if tiles is None:
        tiles = weight.new_empty(-(-outputs // 32) * 2, inputs // 32, 16, 16, 2)
    kernel("linear_tiles")(weight, tiles, inputs, outputs, weight.stride(1), weight.stride(0))
    return tiles


@functools.cache
def has_tiles() -> bool:
    """Whether products can be made in C: the processor has a unit for them, and the system lets us use it."""
    compiled = library()
    return compiled is not None and bool(compiled.has_tiles())


class PackedFeedForward:
    """The forward of a feed-forward whose linear layers are packed: the activation, and the gate's product, in their kernels."""

    def __init__(self, module: GPT2MLP | LlamaMLP | Qwen2MLP):
        self.module = module

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        module = self.module
        if not packs(x):
            return type(module).forward(module, x)
        if isinstance(module, GPT2MLP):
            result = module.c_proj(module.c_fc.forward.run(x, GELU))
            return module.dropout(result) if module.training else result
        return module.down_proj(module.up_proj.forward.run(x, TIMES, module.gate_proj.forward.run(x, SILU)))


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
            module.forward = PackedForward(module, frozen=frozen and module.weight is not tied, tiled=not frozen)
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
