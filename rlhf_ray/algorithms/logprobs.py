"""Log-probabilities of given tokens.   N tokens, V vocabulary entries.

support: bool [..., V], the tokens that each was drawn among where sampling truncates; the distribution is renormalised over
them. None: all tokens.
"""

from __future__ import annotations

# torch.autograd.Function and Tensor.split have no annotations, so strict would find their results unknown.
# pyright: basic
import torch

# Logits that are worked on at a time, in float32: 1 MiB stays in a core's cache; a GPU wants work for all of its cores.
PIECE = {"cpu": 2**18, "cuda": 2**27}


def selected_logprobs(
    logits: torch.Tensor, ids: torch.Tensor, *, temperature: float, support: torch.Tensor | None = None
) -> torch.Tensor:
    """log softmax(logits / temperature) at ids, in float32 (float64 of float64).   logits [..., V], ids [...] -> [...]

    No float32 copy of all logits is made, neither here nor for the gradient, which has the dtype of the logits.
    """
    flat, _ = _SelectedLogprobs.apply(logits.flatten(0, -2), ids.flatten(), float(temperature), False, _flat(support))
    return flat.view(ids.shape)


def selected_logprobs_and_entropy(
    logits: torch.Tensor, ids: torch.Tensor, *, temperature: float, support: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `selected_logprobs` and `entropy`, in one reading of the logits; the entropy has no gradient."""
    both = _SelectedLogprobs.apply(logits.flatten(0, -2), ids.flatten(), float(temperature), True, _flat(support))
    return both[0].view(ids.shape), both[1].view(ids.shape)


def entropy(logits: torch.Tensor, *, temperature: float, support: torch.Tensor | None = None) -> torch.Tensor:
    """Entropy in nats of softmax(logits / temperature), in float32.   logits [..., V] -> [...]"""
    flat, among = logits.flatten(0, -2), _flat(support)
    parts = [_entropy(_tempered(flat[rows], temperature), None if among is None else among[rows]) for rows in _pieces(flat)]
    return torch.cat(parts).view(logits.shape[:-1])


def _entropy(logits: torch.Tensor, support: torch.Tensor | None) -> torch.Tensor:
    if support is None:
        return logits.logsumexp(-1) - (logits.softmax(-1) * logits).sum(-1)
    inside, logits = logits.masked_fill(~support, 0.0), logits.masked_fill(~support, -torch.inf)
    return logits.logsumexp(-1) - (logits.softmax(-1) * inside).sum(-1)


def _flat(support: torch.Tensor | None) -> torch.Tensor | None:
    return None if support is None else support.flatten(0, -2)


class _SelectedLogprobs(torch.autograd.Function):
    """With y = logits / temperature: y[id] - logsumexp(y), whose gradient by the logits is (1[id] - softmax(y)) / temperature.

    For the gradient of 16-bit logits the softmax is kept, in their dtype: it is rounded to that anyway, and exponentials are most
    of the work.
    """

    @staticmethod
    def forward(ctx, logits, ids, temperature, with_entropy, support):
        dtype = torch.promote_types(logits.dtype, torch.float32)
        keeps_shares = ctx.needs_input_grad[0] and dtype != logits.dtype
        kept = torch.empty_like(logits) if keeps_shares else logits
        selected, norms, entropies = (torch.empty(len(logits), dtype=dtype, device=logits.device) for _ in range(3))
        ctx.save_for_backward(kept, ids, norms, support)
        ctx.keeps_shares, ctx.temperature = keeps_shares, temperature
        ctx.mark_non_differentiable(entropies)
        for rows in _pieces(logits):
            tempered = _within(_tempered(logits[rows], temperature), support, rows)
            top = tempered.amax(-1, keepdim=True)
            shares = (tempered - top).exp_()
            total = shares.sum(-1)
            if keeps_shares:
                kept[rows] = shares.mul_(1 / total[:, None])
            norms[rows] = total.log() + top.squeeze(-1)
            selected[rows] = tempered.gather(1, ids[rows, None]).squeeze(1) - norms[rows]
            if with_entropy:
                if support is not None:  # 0 times -infinity
                    tempered = tempered.masked_fill(~support[rows], 0.0)
                mean = shares.mul_(tempered).sum(-1)
                entropies[rows] = norms[rows] - (mean if keeps_shares else mean / total)
        return selected, entropies

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient, _):
        logits, ids, norms, support = ctx.saved_tensors
        gradient = (gradient / ctx.temperature)[:, None]
        if ctx.keeps_shares:
            gradient = gradient.to(logits.dtype)
            return add_at(logits * -gradient, ids, gradient), None, None, None, None
        result = torch.empty_like(logits)
        for rows in _pieces(logits):
            tempered = _within(_tempered(logits[rows], ctx.temperature), support, rows)
            probs = (tempered - norms[rows, None]).exp_()
            result[rows] = add_at(probs.mul_(-gradient[rows]), ids[rows], gradient[rows])
        return result, None, None, None, None


def add_at(values: torch.Tensor, columns: torch.Tensor, amounts: torch.Tensor) -> torch.Tensor:
    """amounts [N, 1] added to values [N, V] in place, in each row at its column [N]. On CPUs scatter_add_ copies all of them,
    twice."""
    values[torch.arange(len(values), device=values.device), columns] += amounts.squeeze(1)
    return values


def _tempered(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits / temperature if temperature != 1.0 else logits


def _within(logits: torch.Tensor, support: torch.Tensor | None, rows: slice) -> torch.Tensor:
    return logits if support is None else logits.masked_fill(~support[rows], -torch.inf)


def _rows_at_a_time(logits: torch.Tensor) -> int:
    return max(1, PIECE.get(logits.device.type, PIECE["cuda"]) // logits.shape[-1])


def _pieces(logits: torch.Tensor):
    step = _rows_at_a_time(logits)
    return (slice(start, start + step) for start in range(0, len(logits), step))
