"""Embeddings that train on a CPU, each with a backward pass that adds to the weight's gradient itself.

Autograd makes a gradient of the weight's whole size in every backward pass, nearly all of it zeros, and adds that to the sum. Here
the rows that were looked up are added to, in memory that stands where it stood in the step before.

For modules whose gradients add up in `.grad` until the optimiser steps: not under ZeRO, which takes them out of it.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import embedding


def add_to_looked_up_rows(module: nn.Module) -> None:
    """Let the plain embeddings that train on a CPU work like this, in place; weights and their names stay."""
    for child in module.modules():
        if type(child) is nn.Embedding and _trains(child) and not _does_more(child):
            child.forward = _Embedding(child)


def _trains(layer: nn.Embedding) -> bool:
    return layer.weight.device.type == "cpu" and layer.weight.requires_grad


def _does_more(layer: nn.Embedding) -> bool:
    return layer.max_norm is not None or layer.scale_grad_by_freq or layer.sparse or layer.padding_idx is not None


class _Embedding:
    def __init__(self, layer: nn.Embedding):
        self.layer = layer
        self._memory: torch.Tensor | None = None

    def __call__(self, input: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return embedding(input, self.layer.weight)
        return _Lookup.apply(self.layer.weight, input, self)

    def sum(self) -> torch.Tensor:
        """The gradient so far, to add to."""
        weight = self.layer.weight
        if weight.grad is None:
            if self._memory is None:
                self._memory = torch.empty_like(weight)
            weight.grad = self._memory.zero_()
        return weight.grad


class _Lookup(torch.autograd.Function):
    """weight [V, C], ids [...] -> [..., C]"""

    @staticmethod
    def forward(ctx, weight, ids, gradient_of):
        ctx.gradient_of = gradient_of
        ctx.save_for_backward(ids)
        return embedding(ids, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        (ids,) = ctx.saved_tensors
        total = ctx.gradient_of.sum()
        total.index_add_(0, ids.flatten(), gradient.flatten(0, -2).to(total.dtype))
        return None, None, None
