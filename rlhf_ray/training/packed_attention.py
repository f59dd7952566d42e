"""Attention of packed sequences: causal, each within itself.

R sequences, N tokens of them all on one line, S tokens of the longest, H key-value heads, D channels per head. The line is laid out
as [R, S] rows, each padded on the right.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward

# On CPUs plain matrix products are the faster attention up to this length (at 80 tokens a whole forward and backward pass takes
# 1.3 times as long with the fused kernel: rlhf_ray/bench/trials.py); their memory, which grows with the square, counts beyond.
PLAIN_LENGTH = 256


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the tokens of the line stand in the rows of attention."""

    rows: int
    longest: int
    spread: torch.Tensor | None  # [R * S] place on the line of each slot's token; None: there is no padding
    gather: torch.Tensor | None  # [N] slot of each token on the line

    @classmethod
    def of(cls, lengths: np.ndarray, device: torch.device | str = "cpu") -> Layout:
        """lengths [R]. A slot of padding repeats the row's last token: finite, and behind everything that counts."""
        longest, starts = int(lengths.max()), np.cumsum(lengths) - lengths
        if (lengths == longest).all():
            return cls(len(lengths), longest, None, None)
        slots = np.arange(longest)
        spread = starts[:, None] + np.minimum(slots, lengths[:, None] - 1)
        gather = np.flatnonzero((slots < lengths[:, None]).ravel())
        places = torch.from_numpy(spread.ravel()).to(device), torch.from_numpy(gather).to(device)
        return cls(len(lengths), longest, *places)


class _Spread(torch.autograd.Function):
    """[N, C] -> [R * S, C]. The slots of padding have no gradient (`_Gather` gives them none), so its own is a gather too."""

    @staticmethod
    def forward(ctx, line, layout):
        ctx.layout = layout
        return line.index_select(0, layout.spread)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.index_select(0, ctx.layout.gather), None


class _Gather(torch.autograd.Function):
    """[R * S, C] -> [N, C]"""

    @staticmethod
    def forward(ctx, rows, layout):
        ctx.layout = layout
        return rows.index_select(0, layout.gather)

    @staticmethod
    def backward(ctx, gradient):
        rows = gradient.new_zeros(len(ctx.layout.spread), gradient.shape[1])
        return rows.index_copy_(0, ctx.layout.gather, gradient), None


def packed_attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, packed=None, **kwargs):
    """Causal attention within each sequence of the line; transformers' sdpa for callers without a layout.

    query [1, heads, N, D], key and value [1, H, N, D] -> [1, N, heads, D].
    """
    if packed is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    query, key, value = (_as_rows(states, packed) for states in (query, key, value))
    if query.device.type == "cpu" and packed.longest <= PLAIN_LENGTH:
        output = _plain_attention(query, key, value, dropout, scaling)
    else:
        grouped = query.shape[1] != key.shape[1]
        output = scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=grouped
        )
    return _as_line(output, packed), None


def _as_rows(states: torch.Tensor, layout: Layout) -> torch.Tensor:
    """[1, H, N, D] -> [R, H, S, D]"""
    _, heads, tokens, channels = states.shape
    line = states.squeeze(0).transpose(0, 1).reshape(tokens, heads * channels)
    if layout.spread is not None:
        line = _Spread.apply(line, layout)
    return line.view(layout.rows, layout.longest, heads, channels).transpose(1, 2)


def _as_line(states: torch.Tensor, layout: Layout) -> torch.Tensor:
    """[R, H, S, D] -> [1, N, H, D]"""
    rows, heads, longest, channels = states.shape
    line = states.transpose(1, 2).reshape(rows * longest, heads * channels)
    if layout.spread is not None:
        line = _Gather.apply(line, layout)
    return line.view(1, -1, heads, channels)


def _plain_attention(query, key, value, dropout: float, scaling: float | None) -> torch.Tensor:
    """softmax(q k^T / sqrt(D) + causal) v, each product by itself.   [R, heads, S, D], [R, H, S, D] -> [R, heads, S, D]"""
    rows, heads, longest, channels = query.shape
    groups = key.shape[1]
    query = query.reshape(rows * groups, heads // groups * longest, channels)
    key, value = (states.reshape(rows * groups, longest, channels) for states in (key, value))
    hidden = torch.full((longest, longest), -torch.inf, dtype=query.dtype, device=query.device).triu(1)
    hidden = hidden.repeat(heads // groups, 1)
    scores = torch.baddbmm(hidden, query, key.transpose(1, 2), alpha=channels**-0.5 if scaling is None else scaling)
    weights = torch.dropout(softmax(scores), dropout, train=dropout > 0)
    return torch.bmm(weights, value).view(rows, heads, longest, channels)


def softmax(scores: torch.Tensor) -> torch.Tensor:
    """Over the last dimension, computed in float32, kept in the dtype of scores.

    On CPUs the kernel for 16 bits reads columns beyond a multiple of 32 one by one.
    """
    return _Softmax.apply(scores)


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores):
        weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(scores.dtype)
        ctx.save_for_backward(weights)
        return weights

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        (weights,) = ctx.saved_tensors
        return torch._softmax_backward_data(gradient, weights, -1, weights.dtype)
