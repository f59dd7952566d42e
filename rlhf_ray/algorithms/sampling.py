"""From logits and uniform draws to tokens and their log-probabilities.   n rows, V vocabulary entries.

The distribution that a token is drawn from: float32 log-softmax of logits / temperature, cut to the top_k likeliest
tokens, then to the smallest set with probability top_p of what is left, then to the tokens with at least min_p times
the likeliest one's probability, then renormalised. Tokens are kept by value: those that tie with the last one kept are
kept too, so the set does not depend on the order of the vocabulary.

Every parameter is one number for all rows, or a tensor [n].
"""

from __future__ import annotations

# torch annotates sum in part only.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
import torch

Parameter = float | int | torch.Tensor
PIECE = 128  # of the vocabulary


def tempered_logprobs(logits: torch.Tensor, *, temperature: Parameter) -> torch.Tensor:
    """log softmax(logits / temperature) in float32.   logits [..., V]; temperature above 0."""
    return _tempered(logits, temperature).log_softmax(-1)


def _tempered(logits: torch.Tensor, temperature: Parameter) -> torch.Tensor:
    logits = logits.float()
    if isinstance(temperature, torch.Tensor):
        return logits / temperature[..., None]
    return logits / temperature if temperature != 1.0 else logits


def truncate(logprobs: torch.Tensor, *, top_k: Parameter = 0, top_p: Parameter = 1.0, min_p: Parameter = 0.0) -> torch.Tensor:
    """Drop the unlikely tokens (-inf) and renormalise the others.   logprobs [..., V], normalised -> the same shape.

    top_k 0, top_p 1 and min_p 0 keep every token; when all three do so for every row, the input comes back as it is.
    """
    if not _is_on(top_k, 0) and not _is_on(top_p, 1.0) and not _is_on(min_p, 0.0):
        return logprobs
    if _is_on(top_k, 0):
        logprobs = logprobs.masked_fill(logprobs < _kth_largest(logprobs, top_k), -torch.inf)
    if _is_on(top_p, 1.0):
        logprobs = logprobs.masked_fill(logprobs < _nucleus_edge(logprobs, top_p), -torch.inf)
    if _is_on(min_p, 0.0):
        # log(0) is -inf, which drops nothing.
        share = _column(min_p, logprobs).log()
        logprobs = logprobs.masked_fill(logprobs < logprobs.amax(-1, keepdim=True) + share, -torch.inf)
    return logprobs - logprobs.logsumexp(-1, keepdim=True)


def inverse_cdf(logprobs: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """The first token whose cumulative probability exceeds uniforms.   logprobs [n, V], uniforms [n] in [0, 1) -> [n]."""
    return _inverse_cdf(logprobs.exp(), uniforms)[0]


def _inverse_cdf(probs: torch.Tensor, uniforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for probabilities [n, V] up to one factor per row, and their sum [n].

    A token of probability zero is never drawn: it does not raise the sum. The draw is scaled by the sum of them all, so
    rounding in the sum never leaves a draw beyond the last token.
    """
    # A parallel scan on a GPU adds in another order for each entry; float64 keeps it monotone where it matters.
    dtype, vocab_size = torch.float64 if probs.is_cuda else torch.float32, probs.shape[-1]
    # First the piece that holds it, then the token in the piece: sums take a fraction of the time of a scan of the vocabulary.
    whole = vocab_size - vocab_size % PIECE
    sums = probs[:, :whole].unflatten(1, (-1, PIECE)).sum(-1, dtype=dtype)
    rest = probs[:, whole:].sum(-1, keepdim=True, dtype=dtype)
    ends = torch.cat((sums, rest), 1).cumsum(1)
    targets = uniforms.to(dtype)[:, None] * ends[:, -1:]
    pieces = torch.searchsorted(ends, targets, right=True).clamp_(max=ends.shape[1] - 1)
    targets = targets - ends.gather(1, (pieces - 1).clamp(min=0)).where(pieces > 0, 0.0)
    places = pieces * PIECE + torch.arange(PIECE, device=probs.device)
    inside = probs.gather(1, places.clamp(max=vocab_size - 1)).where(places < vocab_size, 0.0).cumsum(1, dtype=dtype)
    # The two ways of adding round differently: a draw at a piece's very end must not leave it.
    targets = torch.minimum(targets, inside[:, -1:].nextafter(torch.zeros((), dtype=dtype, device=probs.device)))
    tokens = (pieces * PIECE + torch.searchsorted(inside, targets, right=True)).squeeze(1)
    return tokens.clamp_(max=vocab_size - 1), ends[:, -1]  # only a row of NaN goes beyond; its log-prob tells


def draw(
    logits: torch.Tensor,  # [n, V]
    uniforms: torch.Tensor,  # [n] in [0, 1)
    *,
    temperature: Parameter,  # 0: the likeliest token, with its log-prob under the untempered distribution
    top_k: Parameter = 0,
    top_p: Parameter = 1.0,
    min_p: Parameter = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token per row and its log-prob under the distribution it was drawn from.   -> [n] int64, [n] float32."""
    if isinstance(temperature, torch.Tensor):
        greedy = temperature == 0
        untruncated = tempered_logprobs(logits, temperature=torch.where(greedy, 1.0, temperature))
        logprobs = truncate(untruncated, top_k=top_k, top_p=top_p, min_p=min_p)
        tokens = torch.where(greedy, untruncated.argmax(-1), inverse_cdf(logprobs, uniforms))
        return tokens, torch.where(greedy, _at(untruncated, tokens), _at(logprobs, tokens))
    if temperature == 0:
        logprobs = tempered_logprobs(logits, temperature=1.0)
        tokens = logprobs.argmax(-1)
    elif _is_on(top_k, 0) or _is_on(top_p, 1.0) or _is_on(min_p, 0.0):
        logprobs = truncate(tempered_logprobs(logits, temperature=temperature), top_k=top_k, top_p=top_p, min_p=min_p)
        tokens = inverse_cdf(logprobs, uniforms)
    else:
        return _draw_from_all(logits, uniforms, temperature)
    return tokens, _at(logprobs, tokens)


def draw_and_tell(
    logits: torch.Tensor,  # [n, V]
    uniforms: torch.Tensor,  # [n] in [0, 1)
    *,
    temperature: Parameter,  # above 0
    top_k: Parameter = 0,
    top_p: Parameter = 1.0,
    min_p: Parameter = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `draw`, and what it drew among: bool [n, V], and the log of its probability before the rest was dropped: [n]."""
    untruncated = tempered_logprobs(logits, temperature=temperature)
    logprobs = truncate(untruncated, top_k=top_k, top_p=top_p, min_p=min_p)
    tokens = inverse_cdf(logprobs, uniforms)
    drawn = _at(logprobs, tokens)
    return tokens, drawn, logprobs > -torch.inf, _at(untruncated, tokens) - drawn


def _draw_from_all(
    logits: torch.Tensor, uniforms: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`draw` where no token is cut off: each exponential is taken once, and only the drawn token's log-prob made."""
    logits = _tempered(logits, temperature)
    top = logits.amax(-1, keepdim=True)
    tokens, total = _inverse_cdf((logits - top).exp_(), uniforms)
    return tokens, (_at(logits, tokens) - top.squeeze(-1) - total.log()).float()


def _at(logprobs: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return logprobs.gather(-1, tokens[:, None]).squeeze(-1)


def _is_on(parameter: Parameter, off: float) -> bool:
    return isinstance(parameter, torch.Tensor) or parameter != off


def _column(parameter: Parameter, like: torch.Tensor) -> torch.Tensor:
    """A parameter as a float32 tensor that broadcasts over the vocabulary."""
    parameter = torch.as_tensor(parameter, dtype=torch.float32, device=like.device)
    return parameter[..., None] if parameter.ndim else parameter


def _kth_largest(logprobs: torch.Tensor, top_k: Parameter) -> torch.Tensor:
    """The top_k-th largest entry of each row; -inf where top_k is 0 or not below V."""
    vocab_size = logprobs.shape[-1]
    if not isinstance(top_k, torch.Tensor):
        return logprobs.topk(min(int(top_k), vocab_size), dim=-1).values[..., -1:]
    top_k = top_k.long()[..., None]
    on = (top_k > 0) & (top_k < vocab_size)
    largest = int(torch.where(on, top_k, 1).amax())
    values = logprobs.topk(largest, dim=-1).values
    return torch.where(on, values.gather(-1, (top_k - 1).clamp(0, largest - 1)), -torch.inf)


def _nucleus_edge(logprobs: torch.Tensor, top_p: Parameter) -> torch.Tensor:
    """The least likely entry of each row's smallest set with probability top_p; -inf where top_p is 1."""
    top_p = _column(top_p, logprobs)
    total = logprobs.logsumexp(-1, keepdim=True)  # not 0 after a top_k
    # A few likely tokens hold top_p as a rule, and sorting the whole vocabulary costs as much as the rest of a step.
    for candidates in (min(512, logprobs.shape[-1]), logprobs.shape[-1]):
        ordered = logprobs.topk(candidates, dim=-1).values
        probs = (ordered - total).exp()
        cumulative = probs.cumsum(-1)
        if bool(((cumulative[..., -1:] >= top_p) | (top_p >= 1)).all()):
            break
    before = cumulative - probs  # probability of the likelier tokens; 0 for the first
    edge = ordered.gather(-1, ((before < top_p).sum(-1, keepdim=True) - 1).clamp(min=0))  # a top_p that is 0 in float32
    return torch.where(top_p < 1, edge, -torch.inf)
