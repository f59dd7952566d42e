"""Linear layers that keep their weights in the order in which the CPU's kernel for products reads them.   K inputs, D outputs.

Without it the kernel puts a weight into that order on every call, which for the few rows of a decode step takes a good part of
the product's time, and a feed-forward's activation is a separate pass over the widest numbers of a block (measured:
rlhf_ray/bench/ablation.py). The cost is a second copy of the weights.
"""

from __future__ import annotations

# Layers of transformers are changed in place, which their annotations do not know.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportOptionalSubscript=false, reportOptionalMemberAccess=false, reportReturnType=false
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import GELUTanh, NewGELUActivation, SiLUActivation
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP
from transformers.pytorch_utils import Conv1D

from rlhf_ray.cpu.compiled import call, library
from rlhf_ray.models.activation import SigmoidGELU

PANEL_OUTPUTS = 32  # at most
ROWS = 64  # that the order is chosen for; it is the faster one from 1 row to hundreds
# What follows a product, in the same kernel; numbered as in vectors.h.
NOTHING, GELU, SILU, TIMES = range(4)
NAMES = {NOTHING: ("none", [], ""), GELU: ("gelu", [], "tanh"), SILU: ("swish", [], "")}  # torch's


class PackedForward:
    """The forward of a linear layer where there is no gradient and products are in `dtype`, float32 (in C) or bfloat16 (by torch's
    kernel); else the layer's own. It packs again when the weight has changed, which torch counts."""

    def __init__(self, layer: nn.Linear | Conv1D, *, dtype: torch.dtype):
        self.layer, self.dtype = layer, dtype
        self.outputs = layer.weight.shape[1 if isinstance(layer, Conv1D) else 0]
        self._of: tuple[torch.Tensor, int, int] | None = None  # the weight that is packed, where it stood, and its version
        self._packed: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if product_dtype(x) != self.dtype:
            return type(self.layer).forward(self.layer, x)
        return self.run(x, NOTHING)

    def run(self, x: torch.Tensor, after: int, other: torch.Tensor | None = None) -> torch.Tensor:
        """x W + b, then the activation, or times the other, in one kernel."""
        x, bias = x.to(self.dtype), self.layer.bias
        bias = None if bias is None else bias.to(self.dtype)
        if self.dtype == torch.float32:
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
    call("linear_panels", weight, panels, inputs, outputs, weight.stride(1), weight.stride(0))
    return panels


def product(
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
    call("linear", x, panels, bias, other, result, x.numel() // inputs, inputs, outputs, after)
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


def pack_linears(model: PreTrainedModel) -> None:
    """Let the model's linear layers run packed, in place, if there is a kernel for its dtype; those of other classes stay."""
    if not _has_kernel(model.dtype):
        return
    for module in model.modules():
        plain = (type(module) is nn.Linear or type(module) is Conv1D) and not module.weight.is_inference()
        packed = isinstance(module.forward, PackedForward) and module.forward.dtype == model.dtype  # of another model, too
        if plain and not packed and (model.dtype == torch.bfloat16 or module.weight.dtype == torch.float32):
            module.forward = PackedForward(module, dtype=model.dtype)
    for module in model.modules():
        if _can_fuse(module):
            module.forward = PackedFeedForward(module)


def _has_kernel(dtype: torch.dtype) -> bool:
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32 and library() is not None


def _can_fuse(module: nn.Module) -> bool:
    if type(module) is GPT2MLP:
        linears = module.c_fc, module.c_proj
        known = isinstance(module.act, (SigmoidGELU, NewGELUActivation, GELUTanh))
    elif type(module) in (LlamaMLP, Qwen2MLP):
        linears = module.gate_proj, module.up_proj, module.down_proj
        known = isinstance(module.act_fn, (nn.SiLU, SiLUActivation))
    else:
        return False
    return known and all(isinstance(layer.forward, PackedForward) for layer in linears)
