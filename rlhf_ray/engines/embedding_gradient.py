"""The gradient of an embedding, added to the few rows that were looked up.

Torch makes a gradient of the embedding's whole size for every backward pass, nearly all of it zeros, and adds that up: at 50,257
entries of width 768 fresh memory of 154 MB a microbatch (results/bench/trials.py).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.nn.functional import embedding


class _Lookup(torch.autograd.Function):
    """weight [V, C], ids [...] -> [..., C]. Where weight.grad is there, backward adds to it, and gives autograd nothing."""

    @staticmethod
    def forward(ctx, weight, ids):
        ctx.weight = weight  # itself, not a saved copy: its .grad is what counts
        ctx.save_for_backward(ids)
        return embedding(ids, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        (ids,) = ctx.saved_tensors
        total = ctx.weight.grad
        into = torch.zeros_like(ctx.weight) if total is None else total
        into.index_add_(0, ids.flatten(), gradient.flatten(0, -2).to(into.dtype))
        return (into if total is None else None), None


def add_in_place(module: nn.Module) -> None:
    """Let the plain embeddings that train on a CPU look up so, in place.

    For modules whose gradients add up in `.grad` until the optimiser steps: not under ZeRO, which takes them out of it.
    """
    for child in module.modules():
        if type(child) is nn.Embedding and _is_plain(child):
            child.forward = partial(_look_up, child)


def _is_plain(layer: nn.Embedding) -> bool:
    special = layer.max_norm is not None or layer.scale_grad_by_freq or layer.sparse or layer.padding_idx is not None
    return not special and layer.weight.requires_grad and layer.weight.device.type == "cpu"


def _look_up(layer: nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
    return _Lookup.apply(layer.weight, ids) if torch.is_grad_enabled() else embedding(ids, layer.weight)
