"""A decode step's operations in C.   n rows, H key-value heads, D channels per head.

The functions in C take float32 on CPUs, and attention bfloat16 too. For other numbers each operation is torch's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import nn

from rlhf_ray.cpu.compiled import call
from rlhf_ray.cpu.protocols import Cache, DecodeOperations, Layer


class OperationsInC:
    """In place of other operations, which still do what these can't."""

    def __init__(self, others: DecodeOperations):
        self.others = others

    def embed(self, tokens, positions, words: nn.Module, places: nn.Module | None = None) -> torch.Tensor:
        plain = all(each is None or (type(each) is nn.Embedding and each.max_norm is None) for each in (words, places))
        tables = [words.weight, None if places is None else places.weight]
        if not plain or not _fit(*tables):
            return self.others.embed(tokens, positions, words, places)
        result = tables[0].new_empty(len(tokens), tables[0].shape[1])
        call("embed", *tables, tokens, positions, result, *result.shape)
        return result

    def add_and_normalise(self, hidden: torch.Tensor, change: torch.Tensor | None, norm: nn.Module) -> torch.Tensor:
        weight, bias = cast(torch.Tensor, norm.weight), getattr(norm, "bias", None)  # RMS norms have none
        if not _fit(hidden, change, weight, bias):
            return self.others.add_and_normalise(hidden, change, norm)
        result = torch.empty_like(hidden)
        eps = norm.variance_epsilon if bias is None else norm.eps
        call("add_and_normalise", hidden, change, weight, bias, result, *hidden.shape, eps)
        return result

    def turn(self, states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        if not _fit(states, cos, sin):
            return self.others.turn(states, cos, sin, positions)
        call("turn", states, cos, sin, positions, *states.shape)
        return states

    def attention(self, cache: Cache, dtype: torch.dtype, groups: int, channels: int) -> Callable[..., torch.Tensor]:
        fits = {torch.bfloat16: channels % 2 == 0, torch.float32: not cache.centred}
        return attend if fits.get(dtype, False) else self.others.attention(cache, dtype, groups, channels)


def attend(layer: Layer, query, key, value, scaling: float) -> torch.Tensor:
    """Store the new keys and values, and attend over each row's own slots.

    query [n, heads, D], key and value [n, H, D] (apart by the same step) -> [n, heads * D]
    """
    (n, heads, channels), groups = query.shape, key.shape[1]
    if not layer.is_initialized:
        layer.lazy_initialization(key[:, :, None], value[:, :, None])
    mixed = query.new_empty(n, heads * channels)
    given, pair, name = [query, key, value, layer.keys, layer.values], 1, "decode_attention_float32"
    if query.dtype == torch.bfloat16:  # counted in twos, which are 32 bits
        given.append(layer.centres if layer.centred else None)
        pair, name = 2, "decode_attention_bfloat16"
    call(
        name, *given, layer.write.targets, mixed, n, groups, heads // groups, channels // pair, layer.keys.shape[2],
        query.stride(0) // pair, key.stride(0) // pair, scaling,
    )  # fmt: skip
    return mixed


def _fit(*tensors: torch.Tensor | None) -> bool:
    """In float32, one number after the other."""
    return all(each is None or (each.dtype == torch.float32 and each.is_contiguous()) for each in tensors)
