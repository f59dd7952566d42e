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
    flat, _ = _SelectedLogprobs.apply(logits.flatten(0, -2), ids.flatten(), float(temperature), _flat(support), False, False)
    return flat.view(ids.shape)


def selected_logprobs_and_entropy(
    logits: torch.Tensor,
    ids: torch.Tensor,
    *,
    temperature: float,
    support: torch.Tensor | None = None,
    entropy_gradient: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `selected_logprobs`, and the entropy in nats of softmax(logits / temperature), in one reading of the logits.

    entropy_gradient: whether the entropy has one. Without, 16-bit logits need fewer exponentials.
    """
    both = _SelectedLogprobs.apply(
        logits.flatten(0, -2), ids.flatten(), float(temperature), _flat(support), True, entropy_gradient
    )
    return both[0].view(ids.shape), both[1].view(ids.shape)


def _flat(support: torch.Tensor | None) -> torch.Tensor | None:
    return None if support is None else support.flatten(0, -2)


class _SelectedLogprobs(torch.autograd.Function):
    """`read_piece` and `piece_gradient`, piece by piece.

    For the gradient of 16-bit logits the softmax is kept, in their dtype: it is rounded to that anyway, and exponentials are most
    of the work. The entropy's gradient needs more digits than that.
    """

    @staticmethod
    def forward(ctx, logits, ids, temperature, support, with_entropy, entropy_gradient):
        dtype = torch.promote_types(logits.dtype, torch.float32)
        keeps_shares = ctx.needs_input_grad[0] and dtype != logits.dtype and not entropy_gradient
        kept = torch.empty_like(logits) if keeps_shares else logits
        selected, norms, entropies = (torch.empty(len(logits), dtype=dtype, device=logits.device) for _ in range(3))
        ctx.save_for_backward(kept, ids, norms, entropies, support)
        ctx.keeps_shares, ctx.temperature, ctx.entropy_gradient = keeps_shares, temperature, entropy_gradient
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropies)
        for rows in _pieces(logits):
            among = None if support is None else support[rows]
            selected[rows], norms[rows], entropy = read_piece(
                logits[rows], ids[rows], temperature, among, with_entropy=with_entropy, shares=kept[rows] if keeps_shares else None
            )
            if entropy is not None:
                entropies[rows] = entropy
        return selected, entropies

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, by_selected, by_entropy):
        logits, ids, norms, entropies, support = ctx.saved_tensors
        if ctx.keeps_shares:
            gradient = (by_selected / ctx.temperature)[:, None].to(logits.dtype)
            return add_at(logits * -gradient, ids, gradient), None, None, None, None, None
        result = torch.empty_like(logits)
        for rows in _pieces(logits):
            of_entropy = (entropies[rows], by_entropy[rows]) if ctx.entropy_gradient else None
            result[rows] = piece_gradient(
                logits[rows], ids[rows], ctx.temperature, None if support is None else support[rows], norms[rows],
                by_selected[rows], of_entropy,
            )  # fmt: skip
        return result, None, None, None, None, None


def read_piece(
    logits: torch.Tensor,
    ids: torch.Tensor,
    temperature: float,
    support: torch.Tensor | None,
    *,
    with_entropy: bool,
    shares: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """With y = logits / temperature in float32: y[id] - logsumexp(y), logsumexp(y) and, if asked for, the entropy of softmax(y).

    logits and support [N, V], ids [N] -> each [N]. shares [N, V]: softmax(y) is written there.
    """
    tempered = _within(_tempered(logits, temperature), support)
    top = tempered.amax(-1, keepdim=True)
    exponentials = (tempered - top).exp_()
    total = exponentials.sum(-1)
    if shares is not None:
        shares.copy_(exponentials.mul_(1 / total[:, None]))
    norms = total.log() + top.squeeze(-1)
    selected = tempered.gather(1, ids[:, None]).squeeze(1) - norms
    if not with_entropy:
        return selected, norms, None
    if support is not None:  # 0 times -infinity
        tempered = tempered.masked_fill(~support, 0.0)
    mean = exponentials.mul_(tempered).sum(-1)
    return selected, norms, norms - (mean if shares is not None else mean / total)


def piece_gradient(
    logits: torch.Tensor,  # [N, V]
    ids: torch.Tensor,  # [N]
    temperature: float,
    support: torch.Tensor | None,  # [N, V]
    norms: torch.Tensor,  # [N], of `read_piece`
    by_selected: torch.Tensor,  # [N], the gradient by the log-prob
    of_entropy: tuple[torch.Tensor, torch.Tensor] | None,  # [N] the entropy, and the gradient by it; None: it has none
) -> torch.Tensor:
    """The gradient by the logits, [N, V], in float32.

    With y = logits / temperature and p = softmax(y), the log-prob's is (1[id] - p) / temperature, and that of the entropy H is
    -p (log p + H) / temperature.
    """
    log_probs = _within(_tempered(logits, temperature), support) - norms[:, None]
    gradient = (by_selected / temperature)[:, None]
    if of_entropy is None:
        return add_at(log_probs.exp_().mul_(-gradient), ids, gradient)
    entropies, by_entropy = of_entropy
    probs = log_probs.exp()
    if support is not None:  # 0 times -infinity
        log_probs.masked_fill_(~support, 0.0)
    pull = log_probs.add_(entropies[:, None]).mul_((by_entropy / temperature)[:, None]).add_(gradient)
    return add_at(probs.mul_(pull.neg_()), ids, gradient)


def add_at(values: torch.Tensor, columns: torch.Tensor, amounts: torch.Tensor) -> torch.Tensor:
    """amounts [N, 1] added to values [N, V] in place, in each row at its column [N]. On CPUs scatter_add_ copies all of them,
    twice."""
    values[torch.arange(len(values), device=values.device), columns] += amounts.squeeze(1)
    return values


def _tempered(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits / temperature if temperature != 1.0 else logits


def _within(logits: torch.Tensor, support: torch.Tensor | None) -> torch.Tensor:
    return logits if support is None else logits.masked_fill(~support, -torch.inf)


def rows_at_a_time(device: torch.device, width: int) -> int:
    """How many rows of `width` numbers make a piece."""
    return max(1, PIECE.get(device.type, PIECE["cuda"]) // width)


def _pieces(logits: torch.Tensor):
    step = rows_at_a_time(logits.device, logits.shape[-1])
    return (slice(start, start + step) for start in range(0, len(logits), step))
