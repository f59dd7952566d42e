"""Layers that train on a CPU, each with a backward pass that adds to its weights' gradients itself.   N tokens, C and D channels.

Autograd makes a gradient of a weight's whole size in every backward pass, in fresh memory, and adds that to the sum; under
autocast it first makes it in bfloat16 and copies that. And it makes 16-bit copies of the weights in every forward pass. At GPT-2's
size that costs as much as a good part of the matrix products (results/bench/trials.py): fresh memory comes page by page. Here
sums and copies stand where they stood in the step before.

For modules whose gradients add up in `.grad` until the optimiser steps: not under ZeRO, which takes them out of it.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import embedding
from transformers.pytorch_utils import Conv1D

from rlhf_ray import kernels
from rlhf_ray.engines.norms import autocasts, sums_in_norms

_NO_ACTIVATION = ("none", [], "")  # the product kernel's names


def train_in_place(module: nn.Module) -> None:
    """Let the plain layers that train on a CPU work so, in place; weights and their names stay."""
    sums_in_norms(module)
    for child in module.modules():
        if type(child) is nn.Embedding and _trains(child) and not _does_more(child):
            child.forward = _Embedding(child)
        elif type(child) in (nn.Linear, Conv1D) and _trains(child):
            child.forward = _Linear(child)


def _trains(layer: nn.Module) -> bool:
    return all(parameter.requires_grad and parameter.device.type == "cpu" for parameter in layer.parameters())


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
        self.gradients = [_Sum(parameter) for parameter in (layer.weight, layer.bias) if parameter is not None]
        self._copies = [_Copy(parameter) for parameter in (layer.weight, layer.bias) if parameter is not None]
        self.outputs_first = isinstance(layer, nn.Linear)  # weight [D, C]; a Conv1D's is [C, D]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if not autocasts():
            return type(self.layer).forward(self.layer, x)
        return _Product.apply(x, self.layer.weight, self.layer.bias, self)

    def copies(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """weight [D, C] and bias [D], in bfloat16."""
        weight, *bias = (copy() for copy in self._copies)
        return (weight if self.outputs_first else weight.t()), (bias[0] if bias else None)


class _Copy:
    """A parameter in bfloat16, made anew when the parameter has changed, which torch counts."""

    def __init__(self, parameter: nn.Parameter):
        self.parameter = parameter
        self._of: tuple[int, int] | None = None  # where the parameter stood, and its version

    def __call__(self) -> torch.Tensor:
        now = self.parameter.data_ptr(), self.parameter._version
        if self._of is None:
            self._copy = self.parameter.detach().bfloat16()
        elif self._of != now:
            self._copy.copy_(self.parameter.detach())
        self._of = now
        return self._copy


class _Product(torch.autograd.Function):
    """x W^T + b: x [..., C], W [D, C], b [D] -> [..., D] in bfloat16"""

    @staticmethod
    def forward(ctx, x, weight, bias, layer):
        ctx.layer, ctx.dtype = layer, x.dtype
        lines, (weight, bias) = x.flatten(0, -2).bfloat16(), layer.copies()
        ctx.save_for_backward(lines, weight)
        return torch.ops.mkldnn._linear_pointwise(lines, weight, bias, *_NO_ACTIVATION).view(*x.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        lines, weight = ctx.saved_tensors
        shape, gradient = gradient.shape[:-1], gradient.flatten(0, -2).contiguous()
        by_weight, *by_bias = ctx.layer.gradients
        factors = (gradient.t(), lines) if ctx.layer.outputs_first else (lines.t(), gradient)
        by_weight.add(torch.mm(*factors, out=_room(by_weight.parameter.shape)))
        if by_bias:
            total = by_bias[0].zeros()
            add = kernels.kernel("accumulate_lines", total, gradient)
            if add is None:
                total.add_(gradient.sum(0, dtype=total.dtype))
            else:
                add(total, gradient, *gradient.shape)
        by_x = torch.mm(gradient, weight).view(*shape, -1).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        return by_x, None, None, None


def _room(shape: torch.Size) -> torch.Tensor:
    """bfloat16 numbers for a moment: the same memory for all layers, so for one thread of a process."""
    global _memory
    if _memory.numel() < shape.numel():
        _memory = torch.empty(shape.numel(), dtype=torch.bfloat16)
    return _memory[: shape.numel()].view(shape)


_memory = torch.empty(0, dtype=torch.bfloat16)
