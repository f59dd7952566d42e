"""Linear layers that keep their weights in the order in which the CPU's kernel for products reads them.   K inputs, D outputs.

Without it the kernel puts a weight into that order on every call, which for the few rows of a decode step takes a good part of
the product's time, and a feed-forward's activation is a pass of its own over the widest numbers of a block (measured:
rlhf_ray/bench/trials.py). The price is a second copy of the weights, or none where they never change again.
"""

from __future__ import annotations

# Layers of transformers are changed in place, which their annotations do not know.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportOptionalSubscript=false, reportOptionalMemberAccess=false, reportReturnType=false
import ctypes

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import GELUTanh, NewGELUActivation, SiLUActivation
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP
from transformers.pytorch_utils import Conv1D

from rlhf_ray.cpu import kernels
from rlhf_ray.cpu.activation import SigmoidGELU

PANEL_OUTPUTS = 32  # at most
ROWS = 64  # that the order is chosen for; it is the faster one from 1 row to hundreds
# What follows a product, in the same kernel; numbered as in kernels/linear.c and linear_float32.c.
NOTHING, GELU, SILU, TIMES, GELU_AND_SLOPE = range(5)
NAMES = {NOTHING: ("none", [], ""), GELU: ("gelu", [], "tanh"), SILU: ("swish", [], "")}  # torch's


class PackedForward:
    """The forward of a linear layer where there is no gradient and products are in `dtype`; else the layer's own.

    It packs anew when the weight has changed, which torch counts. frozen: the weight never changes, and is given up. tiled:
    products in bfloat16 are in C where the processor has a unit for them; else by torch's kernel. Those in float32 always are in C.
    """

    def __init__(
        self, layer: nn.Linear | Conv1D, *, frozen: bool, dtype: torch.dtype = torch.bfloat16, tiled: bool = True
    ):
        self.layer, self.dtype = layer, dtype
        self.outputs, inputs = reversed(layer.weight.shape) if isinstance(layer, Conv1D) else layer.weight.shape
        self.tiled = dtype == torch.bfloat16 and tiled and inputs % 32 == 0 and kernels.has_blocks()
        self._of: tuple[torch.Tensor, int, int] | None = (
            None  # the weight that is packed, where it stood, and its version
        )
        self._packed: torch.Tensor | None = None
        if frozen:
            self._weight()
            layer.weight.data = layer.weight.new_empty(0)  # tied ones are not frozen, so this is nobody else's
            self._of = layer.weight, layer.weight.data_ptr(), layer.weight._version

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if product_dtype(x) != self.dtype:
            return type(self.layer).forward(self.layer, x)
        return self.run(x, NOTHING)

    def run(self, x: torch.Tensor, after: int, other: torch.Tensor | None = None) -> torch.Tensor:
        """x W + b, then the activation, or times the other, in one kernel."""
        x, bias = x.to(self.dtype), self.layer.bias
        bias = None if bias is None else bias.to(self.dtype)
        if self.dtype == torch.float32:
            return product_float32(x.contiguous(), self._weight(), bias, self.outputs, after, other=other)
        if self.tiled:
            return product(x.contiguous(), self._weight(), bias, self.outputs, after, other=other)
        if after == TIMES:
            return torch.ops.mkldnn._linear_pointwise.binary(x, other, self._weight(), bias, "mul")
        return torch.ops.mkldnn._linear_pointwise(x, self._weight(), bias, *NAMES[after])

    def _weight(self) -> torch.Tensor:
        weight = self.layer.weight
        now = weight, weight.data_ptr(), weight._version
        if self._of is None or self._of[0] is not weight or self._of[1:] != now[1:]:
            straight = weight.detach().t() if isinstance(self.layer, Conv1D) else weight.detach()  # [outputs, inputs]
            if self.dtype == torch.float32:
                self._packed = panels_of(straight, self._packed)
            elif self.tiled:
                self._packed = tiles_of(straight, self._packed)
            else:
                self._packed = torch.ops.mkldnn._reorder_linear_weight(straight.bfloat16(), ROWS)
            self._of = now
        return self._packed


def panels_of(weight: torch.Tensor, panels: torch.Tensor | None = None) -> torch.Tensor:
    """[D, K] float32 -> panels of neighbouring outputs, as many as the processor's vectors hold, with zeros for those that the
    last one lacks; one behind the other.

    panels: earlier ones, to be written over.
    """
    outputs, inputs = weight.shape
    if panels is None:
        panels = torch.empty(-(-outputs // PANEL_OUTPUTS) * PANEL_OUTPUTS * inputs, dtype=torch.float32)
    kernels.kernel("linear_panels")(weight, panels, inputs, outputs, weight.stride(1), weight.stride(0))
    return panels


def product_float32(
    x: torch.Tensor,
    panels: torch.Tensor,
    bias: torch.Tensor | None,
    outputs: int,
    after: int = NOTHING,
    *,
    other: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [..., K] W + b -> [..., D] and what comes after, all contiguous in float32."""
    inputs = x.shape[-1]
    assert panels.numel() == -(-outputs // PANEL_OUTPUTS) * PANEL_OUTPUTS * inputs, (
        "x is of another width than the weight"
    )
    result = x.new_empty(*x.shape[:-1], outputs)
    kernels.kernel("linear_float32")(x, panels, bias, other, result, x.numel() // inputs, inputs, outputs, after)
    return result


def tiles_of(weight: torch.Tensor, tiles: torch.Tensor | None = None) -> torch.Tensor:
    """[D, K] -> [D / 16, K / 32] tiles of 16 pairs of inputs x 16 outputs, with outputs of zeros up to a multiple of 32.

    weight: in float32 or bfloat16. tiles: earlier ones, to be written over.
    """
    outputs, inputs = weight.shape
    if weight.dtype not in (torch.float32, torch.bfloat16):
        weight = weight.bfloat16()
    if 1 not in weight.stride():
        weight = weight.contiguous()
    if tiles is None:
        tiles = torch.empty(-(-outputs // 32) * 2, inputs // 32, 16, 16, 2, dtype=torch.bfloat16)
    sources = (weight, None) if weight.dtype == torch.float32 else (None, weight)
    kernels.kernel("linear_tiles")(*sources, tiles, inputs, outputs, weight.stride(1), weight.stride(0))
    return tiles


def product(
    x: torch.Tensor,
    tiles: torch.Tensor,
    bias: torch.Tensor | None,
    outputs: int,
    after: int = NOTHING,
    *,
    other: torch.Tensor | None = None,
    slope: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [..., K] W + b -> [..., D] and what comes after, all contiguous in bfloat16. slope: for the activation's derivative."""
    inputs = x.shape[-1]
    assert tiles.shape[1] * 32 == inputs, "x is of another width than the weight"
    result = x.new_empty(*x.shape[:-1], outputs)
    kernels.kernel("linear")(x, tiles, bias, other, result, slope, x.numel() // inputs, inputs, outputs, after)
    return result


class PackedFeedForward:
    """The forward of a feed-forward whose linear layers are packed: the activation, and the gate's product, in their kernels."""

    def __init__(self, module: GPT2MLP | LlamaMLP | Qwen2MLP):
        self.module = module

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        module = self.module
        first = module.c_fc if isinstance(module, GPT2MLP) else module.gate_proj
        if product_dtype(x) != first.forward.dtype:
            return type(module).forward(module, x)
        if isinstance(module, GPT2MLP):
            result = module.c_proj(module.c_fc.forward.run(x, GELU))
            return module.dropout(result) if module.training else result
        return module.down_proj(module.up_proj.forward.run(x, TIMES, module.gate_proj.forward.run(x, SILU)))


def product_dtype(x: torch.Tensor) -> torch.dtype | None:
    """That of a linear layer's product with x; None: it has a gradient."""
    if torch.is_grad_enabled():
        return None
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


def pack_linears(
    model: PreTrainedModel, *, dtype: torch.dtype, frozen: bool = False, trained: bool | None = None
) -> None:
    """Let linear layers on a CPU with a kernel for products in dtype run packed, in place; those of classes of their own stay.

    frozen: the weights will not change, nor be read from the model, nor used with gradients: one copy is enough. A tied one
    stays. trained: round just as the same layers do in training in bfloat16, with (True) or without (False) `trained_layers`; None:
    as is best.
    """
    if model.device.type != "cpu" or not _has_kernel(model, dtype) or ("packed_frozen" if frozen else "packed_live") in kernels.OFF:
        return
    tied = model.get_input_embeddings().weight
    for module in model.modules():
        plain = type(module) in (nn.Linear, Conv1D) and not module.weight.is_inference()
        if plain and (dtype == torch.bfloat16 or module.weight.dtype == torch.float32):
            frozen_now = frozen and module.weight is not tied
            module.forward = PackedForward(module, frozen=frozen_now, dtype=dtype, tiled=trained is not False)
    for module in model.modules():
        if _can_fuse(module) and (trained is None or (trained and trains_fused(module))):
            module.forward = PackedFeedForward(module)
    if frozen:
        _let_go_of_the_rest(model)


def _has_kernel(model: PreTrainedModel, dtype: torch.dtype) -> bool:
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported() or kernels.has_blocks()
    return dtype == model.dtype == torch.float32 and kernels.library() is not None


def _let_go_of_the_rest(model: PreTrainedModel) -> None:
    """Give back what the weights that were given up stood in."""
    for parameter in model.parameters():
        # A loaded model's weights are views into its file, which stays in memory, all that was read, while one of them does.
        parameter.data = parameter.data.clone()
    # getattr: ctypes knows at run time only which functions a library has; glibc's has this one, musl's has not.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # glibc returns memory between other memory only when it is asked to
        trim(0)


def trains_fused(module: nn.Module) -> bool:
    """Whether `trained_layers` makes one step of this feed-forward."""
    return (
        type(module) is GPT2MLP
        and isinstance(module.act, SigmoidGELU)
        and kernels.has_blocks()
        and all(type(layer) is Conv1D and layer.nx % 32 == 0 for layer in (module.c_fc, module.c_proj))
    )


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
