"""Log-probabilities of given tokens.   B rows, K positions, V vocabulary entries."""

from __future__ import annotations

import torch


def selected_logprobs(logits: torch.Tensor, ids: torch.Tensor, *, temperature: float) -> torch.Tensor:
    """log softmax(logits / temperature) at ids, in float32.   logits [B, K, V], ids [B, K] -> [B, K]."""
    logits = logits.float() / temperature if temperature != 1.0 else logits.float()
    return logits.gather(-1, ids[..., None]).squeeze(-1) - logits.logsumexp(-1)


def entropy(logits: torch.Tensor, *, temperature: float) -> torch.Tensor:
    """Entropy in nats of softmax(logits / temperature), in float32.   logits [B, K, V] -> [B, K]."""
    logits = logits.float() / temperature if temperature != 1.0 else logits.float()
    return logits.logsumexp(-1) - (logits.softmax(-1) * logits).sum(-1)
