"""Log-probs and entropy from the states below the output layer, without all logits at once.   N tokens, V vocabulary, D channels.

A piece of rows at a time is multiplied with the output layer's weight, read and let go; the backward pass multiplies again. So
no tensor of [N, V] exists, for one more product with the output layer (of four, where there were three).
"""

from __future__ import annotations

# torch.autograd.Function has no annotations, so strict would find its results unknown.
# pyright: basic
import torch
from torch.nn.functional import linear

from rlhf_ray.algorithms.logprobs import piece_gradient, read_piece, rows_at_a_time

MANY_ROWS = 1024


def head_logprobs_and_entropy(
    states: torch.Tensor,  # [N, D]
    weight: torch.Tensor,  # [V, D]
    ids: torch.Tensor,  # [N] int64
    *,
    temperature: float,
    compute_dtype: torch.dtype,
    support: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `selected_logprobs_and_entropy` of the logits `states @ weight.T`, both with gradients; -> [N], [N].

    compute_dtype: of the products. The weight's gradient adds up in float32.
    support: [M] rows, ascending, and [M] token ids: what each row's token was drawn among; None: all.
    """
    rows, tokens = (None, None) if support is None else support
    return _HeadLogprobs.apply(states, weight, ids, float(temperature), compute_dtype, rows, tokens)


class _HeadLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states, weight, ids, temperature, compute_dtype, support_rows, support_ids):
        low_states, low_weight = states.to(compute_dtype), weight.to(compute_dtype)
        dtype = torch.promote_types(compute_dtype, torch.float32)
        selected, norms, entropies = (torch.empty(len(states), dtype=dtype, device=states.device) for _ in range(3))
        for piece, support in _pieces(states, weight, support_rows, support_ids):
            logits = linear(low_states[piece], low_weight)
            selected[piece], norms[piece], entropy = read_piece(logits, ids[piece], temperature, support, with_entropy=True)
            assert entropy is not None
            entropies[piece] = entropy
        ctx.save_for_backward(states, weight, ids, norms, entropies, support_rows, support_ids)
        ctx.temperature, ctx.compute_dtype = temperature, compute_dtype
        return selected, entropies

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, by_selected, by_entropy):
        states, weight, ids, norms, entropies, support_rows, support_ids = ctx.saved_tensors
        low_states, low_weight = states.to(ctx.compute_dtype), weight.to(ctx.compute_dtype)
        by_states, by_weight = torch.empty_like(states), None
        if ctx.needs_input_grad[1]:
            by_weight = torch.zeros(weight.shape, dtype=norms.dtype, device=weight.device)
        for piece, support in _pieces(states, weight, support_rows, support_ids):
            gradient = piece_gradient(
                linear(low_states[piece], low_weight), ids[piece], ctx.temperature, support, norms[piece], by_selected[piece],
                (entropies[piece], by_entropy[piece]),
            ).to(ctx.compute_dtype)  # fmt: skip
            by_states[piece] = (gradient @ low_weight).to(states.dtype)
            if by_weight is not None:
                by_weight += gradient.t() @ low_states[piece]
        return by_states, None if by_weight is None else by_weight.to(weight.dtype), None, None, None, None, None


def _pieces(states, weight, support_rows, support_ids):
    """(rows, bool [rows, V] or None) of each piece."""
    rows, (vocabulary, channels) = len(states), weight.shape
    # Of few rows, adding up the weight's gradient would cost as much as the products.
    step = max(rows_at_a_time(states.device, vocabulary), min(channels, MANY_ROWS))
    starts = torch.arange(0, rows + step, step, device=states.device)
    bounds = None if support_rows is None else torch.searchsorted(support_rows, starts).tolist()
    for number, start in enumerate(range(0, rows, step)):
        piece, support = slice(start, min(start + step, rows)), None
        if bounds is not None:
            assert support_rows is not None and support_ids is not None
            within = slice(bounds[number], bounds[number + 1])
            support = torch.zeros(piece.stop - start, vocabulary, dtype=torch.bool, device=states.device)
            support[support_rows[within] - start, support_ids[within]] = True
        yield piece, support
