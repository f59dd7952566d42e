"""Layers that train on a CPU, each with a backward pass that adds to its weights' gradients itself.   N tokens, C and D channels.

Autograd makes a gradient of a weight's whole size in every backward pass, in fresh memory, and adds that to the sum; under
autocast it first makes it in bfloat16 and copies that. And it makes 16-bit copies of the weights in every forward pass. At GPT-2's
size that costs as much as a good part of the matrix products (rlhf_ray/bench/trials.py): fresh memory comes page by page. Here
sums and copies stand where they stood in the step before.

For modules whose gradients add up in `.grad` until the optimiser steps: not under ZeRO, which takes them out of it.
"""

from __future__ import annotations

# Layers of transformers are changed in place, which their annotations do not know.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportOptionalSubscript=false, reportOptionalMemberAccess=false, reportReturnType=false
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import embedding, linear
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
from transformers.pytorch_utils import Conv1D

from rlhf_ray.cpu import kernels
from rlhf_ray.cpu.norms import autocasts, sums_in_norms
from rlhf_ray.cpu.packed_linear import GELU, GELU_AND_SLOPE, NAMES, NOTHING, product, tiles_of, trains_fused


def train_in_place(module: nn.Module) -> None:
    """Let the plain layers that train on a CPU work so, in place; weights and their names stay."""
    if "sums" not in kernels.OFF: sums_in_norms(module)
    if "trained" in kernels.OFF: return
    for child in module.modules():
        if type(child) is nn.Embedding and _trains(child) and not _does_more(child):
            child.forward = _Embedding(child)
        elif type(child) in (nn.Linear, Conv1D) and _on_cpu(child):  # frozen ones too, so that all round alike
            child.forward = _Linear(child)
    for child in module.modules():
        if trains_fused(child) and all(_is_tiled(layer.forward) for layer in (child.c_fc, child.c_proj)):
            child.forward = _FeedForward(child)


def _on_cpu(layer: nn.Module) -> bool:
    return all(parameter.device.type == "cpu" for parameter in layer.parameters())


def _trains(layer: nn.Module) -> bool:
    return _on_cpu(layer) and all(parameter.requires_grad for parameter in layer.parameters())


def _is_tiled(forward: Callable) -> bool:
    return isinstance(forward, _Linear) and forward.tiled


def _does_more(layer: nn.Embedding) -> bool:
    return layer.max_norm is not None or layer.scale_grad_by_freq or layer.sparse or layer.padding_idx is not None


class _Sum:
    """A parameter's gradient, in memory of its own: the first part of a step is written, others are added."""

    def __init__(self, parameter: nn.Parameter):
        self.parameter = parameter
        self.memory: torch.Tensor | None = None

    def _start(self) -> torch.Tensor:
        if self.memory is None:
            self.memory = torch.empty_like(self.parameter)
        self.parameter.grad = self.memory
        return self.memory

    def add(self, part: torch.Tensor) -> None:
        total = self.parameter.grad
        if total is None:
            self._start().copy_(part)
            return
        add = kernels.kernel("accumulate", total, part) if part.dtype == torch.bfloat16 else None
        if add is None:
            total.add_(part)
        else:
            add(total, part, part.numel())

    def room(self) -> tuple[torch.Tensor, int]:
        """Where the sum is, and whether there is one yet."""
        more = self.parameter.grad is not None
        return (self.parameter.grad if more else self._start()), int(more)

    def zeros(self) -> torch.Tensor:
        """The sum so far, to add to."""
        return self._start().zero_() if self.parameter.grad is None else self.parameter.grad


class _Embedding:
    """Its gradient goes to the rows that were looked up; nearly all others of a backward pass are zeros."""

    def __init__(self, layer: nn.Embedding):
        self.layer, self.gradient = layer, _Sum(layer.weight)

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return embedding(ids, self.layer.weight)
        return _Lookup.apply(self.layer.weight, ids, self.gradient)


class _Lookup(torch.autograd.Function):
    """weight [V, C], ids [...] -> [..., C]"""

    @staticmethod
    def forward(ctx, weight, ids, total):
        ctx.total = total
        ctx.save_for_backward(ids)
        return embedding(ids, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        (ids,) = ctx.saved_tensors
        total = ctx.total.zeros()
        total.index_add_(0, ids.flatten(), gradient.flatten(0, -2).to(total.dtype))
        return None, None, None


class _Linear:
    """Under autocast in bfloat16; otherwise the layer's own forward."""

    def __init__(self, layer: nn.Linear | Conv1D):
        self.layer = layer
        self.outputs_first = isinstance(layer, nn.Linear)  # weight [D, C]; a Conv1D's is [C, D]
        self.outputs, inputs = layer.weight.shape if self.outputs_first else reversed(layer.weight.shape)
        plain = layer.weight.dtype == torch.float32 and layer.weight.is_contiguous()
        self.tiled = plain and inputs % 32 == 0 and kernels.has_blocks()
        self._weight = _Copy(layer.weight, self._tiles if self.tiled else self._straight)
        self._bias = None if layer.bias is None else _Copy(layer.bias, _narrow)
        self.by_weight = _Sum(layer.weight)
        self.by_bias = None if layer.bias is None else _Sum(layer.bias)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if not autocasts():
            return type(self.layer).forward(self.layer, x)
        return _Product.apply(x, self.layer.weight, self.layer.bias, self)

    def product(self, lines: torch.Tensor, after: int = NOTHING, slope: torch.Tensor | None = None) -> torch.Tensor:
        """lines [N, C] -> [N, D]. Only products in C have something after them."""
        weight, bias = self._weight(), None if self._bias is None else self._bias()
        if self.tiled:
            return product(lines, weight, bias, self.outputs, after, slope=slope)
        if torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return torch.ops.mkldnn._linear_pointwise(lines, weight, bias, *NAMES[NOTHING])
        return linear(lines, weight, bias)

    def by_input(self, gradient: torch.Tensor, slope: torch.Tensor | None = None) -> torch.Tensor:
        """gradient [N, D] -> [N, C], times slope [N, C]"""
        if not self.tiled:
            return torch.mm(gradient, self._weight())
        lines, inputs = len(gradient), self.layer.weight.numel() // self.outputs
        result = gradient.new_empty(lines, inputs)
        kernels.kernel("linear_by_input")(gradient, self._weight(), slope, result, lines, inputs, self.outputs)
        return result

    def add_gradients(self, lines: torch.Tensor, gradient: torch.Tensor) -> None:
        """Of lines [N, C] and their outputs' gradient [N, D]. What is frozen has none."""
        factors = (gradient, lines) if self.outputs_first else (lines, gradient)
        if not self.layer.weight.requires_grad:
            pass
        elif self.tiled and len(lines):
            total, more = self.by_weight.room()
            kernels.kernel("linear_by_weight")(*factors, total, len(lines), *total.shape, more)
        else:
            self.by_weight.add(torch.mm(factors[0].t(), factors[1], out=_room(self.layer.weight.shape)))
        if self.by_bias is not None and self.layer.bias.requires_grad:
            total = self.by_bias.zeros()
            add = kernels.kernel("accumulate_lines", total, gradient)
            if add is None:
                total.add_(gradient.sum(0, dtype=total.dtype))
            else:
                add(total, gradient, *gradient.shape)

    def _straight(self, weight: torch.Tensor, earlier: torch.Tensor | None) -> torch.Tensor:
        """[D, C] in bfloat16"""
        narrow = weight if self.outputs_first else weight.t()
        return narrow.bfloat16() if earlier is None else earlier.copy_(narrow)

    def _tiles(self, weight: torch.Tensor, earlier: torch.Tensor | None) -> torch.Tensor:
        return tiles_of(weight if self.outputs_first else weight.t(), earlier)


class _Copy:
    """A parameter as products read it, made anew when the parameter has changed, which torch counts."""

    def __init__(self, parameter: nn.Parameter, make: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]):
        self.parameter, self.make = parameter, make
        self._of: tuple[int, int] | None = None  # where the parameter stood, and its version
        self._copy: torch.Tensor | None = None

    def __call__(self) -> torch.Tensor:
        now = self.parameter.data_ptr(), self.parameter._version
        if self._of != now:
            self._copy = self.make(self.parameter.detach(), self._copy)
            self._of = now
        return self._copy


def _narrow(parameter: torch.Tensor, earlier: torch.Tensor | None) -> torch.Tensor:
    return parameter.bfloat16() if earlier is None else earlier.copy_(parameter)


class _Product(torch.autograd.Function):
    """x W^T + b: x [..., C], W [D, C], b [D] -> [..., D] in bfloat16"""

    @staticmethod
    def forward(ctx, x, weight, bias, layer):
        ctx.layer, ctx.dtype = layer, x.dtype
        lines = x.flatten(0, -2).bfloat16().contiguous()
        ctx.save_for_backward(lines)
        return layer.product(lines).view(*x.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        (lines,) = ctx.saved_tensors
        shape, gradient = gradient.shape[:-1], gradient.flatten(0, -2).contiguous()
        ctx.layer.add_gradients(lines, gradient)
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        return ctx.layer.by_input(gradient).view(*shape, -1).to(ctx.dtype), None, None, None


class _FeedForward:
    """GPT-2's, its activation and what that does to the gradient within the products beside it."""

    def __init__(self, module: GPT2MLP):
        self.module = module

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        module = self.module
        if not autocasts():
            return type(module).forward(module, x)
        first, second = module.c_fc.forward, module.c_proj.forward
        if torch.is_grad_enabled():
            parameters = module.c_fc.weight, module.c_fc.bias, module.c_proj.weight, module.c_proj.bias
            result = _GeluBetween.apply(x, *parameters, first, second)
        else:
            lines = x.flatten(0, -2).bfloat16().contiguous()
            result = second.product(first.product(lines, GELU)).view(x.shape)
        return module.dropout(result)


class _GeluBetween(torch.autograd.Function):
    """Two linear layers with GELU between them: x [..., C] -> [..., C] in bfloat16"""

    @staticmethod
    def forward(ctx, x, weight, bias, second_weight, second_bias, first, second):
        ctx.layers, ctx.dtype = (first, second), x.dtype
        lines = x.flatten(0, -2).bfloat16().contiguous()
        slope = lines.new_empty(len(lines), first.outputs)
        inner = first.product(lines, GELU_AND_SLOPE, slope)
        ctx.save_for_backward(lines, inner, slope)
        return second.product(inner).view(x.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        (first, second), (lines, inner, slope) = ctx.layers, ctx.saved_tensors
        shape, gradient = gradient.shape, gradient.flatten(0, -2).contiguous()
        second.add_gradients(inner, gradient)
        by_inner = second.by_input(gradient, slope)
        first.add_gradients(lines, by_inner)
        by_x = first.by_input(by_inner).view(shape).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        return by_x, *[None] * 6


def _room(shape: torch.Size) -> torch.Tensor:
    """bfloat16 numbers for a moment: the same memory for all layers, so for one thread of a process."""
    global _memory
    if _memory.numel() < shape.numel():
        _memory = torch.empty(shape.numel(), dtype=torch.bfloat16)
    return _memory[: shape.numel()].view(shape)


_memory = torch.empty(0, dtype=torch.bfloat16)
