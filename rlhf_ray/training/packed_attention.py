"""Attention of packed sequences: every one to itself, causal.

R sequences, N tokens of them all on one line, S tokens of the longest, H key-value heads, D channels a head. The line is laid out
as [R, S] rows, each padded on the right. On a CPU with a compiler all of it is in C, or the steps between its matrix products.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rlhf_ray.cpu import kernels

# On CPUs plain matrix products are the faster attention up to this length (at 80 tokens a whole forward and backward pass takes
# 1.3 times as long with the fused kernel: rlhf_ray/bench/trials.py); their memory, which grows with the square, counts beyond.
PLAIN_LENGTH = 256
BLOCKS_LENGTH = 1024  # of a whole attention in C: a thread keeps three numbers for each of a sequence's scores


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the tokens of the line stand in the rows of attention."""

    rows: int
    longest: int
    spread: torch.Tensor | None  # [R * S] place on the line of each slot's token; None: there is no padding
    gather: torch.Tensor | None  # [N] slot of each token on the line
    starts: torch.Tensor  # [R] place of each sequence's first token
    lengths: torch.Tensor  # [R]

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())

    @classmethod
    def of(cls, lengths: np.ndarray, device: torch.device | str = "cpu") -> Layout:
        """lengths [R]. A slot of padding repeats the row's last token: finite, and behind everything that counts."""
        longest, starts = int(lengths.max()), np.cumsum(lengths) - lengths
        sequences = torch.from_numpy(starts.astype(np.int64)), torch.from_numpy(lengths.astype(np.int64))
        if (lengths == longest).all():
            return cls(len(lengths), longest, None, None, *sequences)
        slots = np.arange(longest)
        spread = starts[:, None] + np.minimum(slots, lengths[:, None] - 1)
        gather = np.flatnonzero((slots < lengths[:, None]).ravel())
        places = torch.from_numpy(spread.ravel()).to(device), torch.from_numpy(gather).to(device)
        return cls(len(lengths), longest, *places, *sequences)


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
    if dropout == 0.0 and _in_c(query, key, value):
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        in_blocks = query.dtype == torch.bfloat16 and query.shape[-1] % 32 == 0 and kernels.has_blocks() and "block_attention" not in kernels.OFF
        if in_blocks and packed.longest <= BLOCKS_LENGTH:
            return _BlockAttention.apply(query, key, value, packed, scaling), None
        if packed.longest <= PLAIN_LENGTH:
            return _CausalAttention.apply(query, key, value, packed, scaling), None
    query, key, value = (_as_rows(states, packed) for states in (query, key, value))
    if query.device.type == "cpu" and packed.longest <= PLAIN_LENGTH:
        output = _plain_attention(query, key, value, dropout, scaling)
    else:
        grouped = query.shape[1] != key.shape[1]
        output = scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=grouped
        )
    return _as_line(output, packed), None


def _in_c(*states: torch.Tensor) -> bool:
    dtype = states[0].dtype
    return (
        kernels.library() is not None and "attention" not in kernels.OFF
        and dtype in kernels.DTYPES
        and all(each.device.type == "cpu" and each.dtype == dtype for each in states)
    )


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


class _BlockAttention(torch.autograd.Function):
    """Causal attention from line to line, all of it in C: query [1, heads, N, D], key and value [1, H, N, D] -> [1, N, heads, D] in
    bfloat16. Gradients are laid out as the projections' output is, so that no step behind copies them."""

    @staticmethod
    def forward(ctx, query, key, value, layout, scaling):
        query, key, value = (each if each.stride(3) == 1 else each.contiguous() for each in (query, key, value))
        _, heads, tokens, channels = query.shape
        output = query.new_empty(1, tokens, heads, channels)
        norms = query.new_empty(heads, tokens, dtype=torch.float32)
        sizes = layout.rows, tokens, heads, heads // key.shape[1], layout.longest, channels
        ctx.arguments = layout.starts, layout.lengths, *sizes, scaling
        kernels.kernel("attention_forward")(*_placed(query, key, value), output, norms, *ctx.arguments)
        ctx.save_for_backward(query, key, value, output, norms)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        query, key, value, output, norms = ctx.saved_tensors
        by = [each.new_empty(1, each.shape[2], each.shape[1], each.shape[3]) for each in (query, key, value)]
        given = *_placed(query, key, value), output, gradient.contiguous(), norms, *by, *ctx.arguments
        kernels.kernel("attention_backward")(*given)
        return *(each.transpose(1, 2) for each in by), None, None


def _placed(*states: torch.Tensor) -> list:
    """Each with the numbers between its tokens and between its heads."""
    return [part for each in states for part in (each, each.stride(2), each.stride(1))]


class _CausalAttention(torch.autograd.Function):
    """As `_plain_attention` of rows, from line to line: query [1, heads, N, D], key and value [1, H, N, D] -> [1, N, heads, D].
    Gradients are laid out as the projections' output is, so that no step behind copies them."""

    @staticmethod
    def forward(ctx, query, key, value, layout, scaling):
        ctx.layout, ctx.scaling = layout, scaling
        query, key, value = (_rows(states, layout, heads=key.shape[1]) for states in (query, key, value))
        weights = torch.bmm(query, key.transpose(1, 2))
        in_c = kernels.kernel("causal_softmax", dtype=weights.dtype)
        in_c(weights, weights.numel() // layout.longest, layout.longest, scaling)
        ctx.save_for_backward(query, key, value, weights)
        return _line(torch.bmm(weights, value), layout).transpose(1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        query, key, value, weights = ctx.saved_tensors
        layout = ctx.layout
        gradient = _rows(gradient.transpose(1, 2), layout, heads=len(key) // layout.rows)
        by_value = torch.bmm(weights.transpose(1, 2), gradient)
        by_scores = torch.bmm(gradient, value.transpose(1, 2))
        in_c = kernels.kernel("causal_softmax_backward", dtype=weights.dtype)
        in_c(by_scores, weights, by_scores.numel() // layout.longest, layout.longest, ctx.scaling)
        by_query, by_key = torch.bmm(by_scores, key), torch.bmm(by_scores.transpose(1, 2), query)
        return *(_line(states, layout) for states in (by_query, by_key, by_value)), None, None


def _rows(states: torch.Tensor, layout: Layout, heads: int) -> torch.Tensor:
    """[1, h, N, D] -> [R * H, h / H * S, D]"""
    _, all_heads, _, channels = states.shape
    if states.stride(3) != 1:
        states = states.contiguous()
    rows = states.new_empty(layout.rows * heads, all_heads // heads * layout.longest, channels)
    places = layout.starts, layout.lengths, layout.rows, all_heads, layout.longest, channels
    kernels.kernel("attention_rows", dtype=states.dtype)(states, rows, *places, states.stride(2), states.stride(1))
    return rows


def _line(rows: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The inverse of `_rows`, as [N, h, D] lies in memory."""
    channels, heads = rows.shape[-1], rows.numel() // (layout.rows * layout.longest * rows.shape[-1])
    line = rows.new_empty(1, layout.tokens, heads, channels)
    places = layout.starts, layout.lengths, layout.rows, heads, layout.longest, channels
    kernels.kernel("attention_line", dtype=rows.dtype)(rows, line, *places, heads * channels, channels)
    return line.transpose(1, 2)
