"""Log-probs and values of given responses under a model.   B rows, P prompt, T response, S = P + T tokens.

Rows are padded on the right and no attention_mask or position_ids are passed: under a causal mask nothing that counts can
see the padding, positions are 0, 1, 2, ... for every row, and left padding's silent position errors can't happen.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from rlhf_ray.algorithms.logprobs import entropy, selected_logprobs


def pad_rows(
    prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray], *, pad_token_id: int, device="cpu"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """input_ids [B, S] padded on the right, prompt_lengths [B], response_lengths [B]."""
    lengths = [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]
    input_ids = np.full((len(lengths), max(lengths)), pad_token_id, np.int64)
    for row, prompt, response in zip(input_ids, prompts, responses, strict=True):
        row[: len(prompt)] = prompt
        row[len(prompt) : len(prompt) + len(response)] = response
    prompt_lengths = torch.tensor([len(p) for p in prompts], device=device)
    response_lengths = torch.tensor([len(r) for r in responses], device=device)
    return torch.from_numpy(input_ids).to(device), prompt_lengths, response_lengths


def action_mask(response_lengths: torch.Tensor) -> torch.Tensor:
    """[B, T] bool, True on the response's tokens, T the longest response."""
    return torch.arange(int(response_lengths.max()), device=response_lengths.device) < response_lengths[:, None]


def pad_tokens(rows: Sequence[np.ndarray], device="cpu") -> torch.Tensor:
    """Rows of floats, one a response token, as [B, T] with zeros on the right."""
    padded = np.zeros((len(rows), max(map(len, rows))), np.float32)
    for out, row in zip(padded, rows, strict=True):
        out[: len(row)] = row
    return torch.from_numpy(padded).to(device)


def _state_before_token(prompt_lengths: torch.Tensor, response_lengths: torch.Tensor, offset: int) -> torch.Tensor:
    """Where [B, T] the state before response token t stands: position P + t - 1, counted from `offset`."""
    steps = torch.arange(int(response_lengths.max()), device=prompt_lengths.device)
    last = (prompt_lengths + response_lengths - 1)[:, None] - offset
    return torch.minimum((prompt_lengths - 1)[:, None] + steps - offset, last - 1)


class LogprobModel(nn.Module):
    """A causal LM whose forward returns response log-probs [B, T] (and entropy), not logits.

    DeepSpeed needs a module whose forward does the work (ZeRO-3 gathers there). Logits are computed on the response's
    positions only, in the compute dtype; the softmax is float32.
    """

    def __init__(self, model: nn.Module, *, temperature: float, compute_dtype: torch.dtype):
        super().__init__()
        self.model = model
        self.temperature = temperature
        self.compute_dtype = compute_dtype

    def forward(self, input_ids, prompt_lengths, response_lengths, with_entropy: bool = False):
        first = int(prompt_lengths.min()) - 1
        keep = torch.arange(first, input_ids.shape[1] - 1, device=input_ids.device)
        with torch.autocast(input_ids.device.type, self.compute_dtype, enabled=self.compute_dtype != torch.float32):
            logits = self.model(input_ids=input_ids, logits_to_keep=keep, use_cache=False).logits
        at_position = selected_logprobs(logits, input_ids[:, first + 1 :], temperature=self.temperature)
        index = _state_before_token(prompt_lengths, response_lengths, first)
        mask = action_mask(response_lengths)
        logprobs = torch.where(mask, at_position.gather(1, index), 0.0)
        if not with_entropy:
            return logprobs
        per_position = entropy(logits, temperature=self.temperature)
        return logprobs, torch.where(mask, per_position.gather(1, index), 0.0)


class ValueModel(nn.Module):
    """A critic whose forward returns the value [B, T] of the state before each response token."""

    def __init__(self, critic: nn.Module, *, compute_dtype: torch.dtype):
        super().__init__()
        self.model = critic
        self.compute_dtype = compute_dtype

    def forward(self, input_ids, prompt_lengths, response_lengths):
        with torch.autocast(input_ids.device.type, self.compute_dtype, enabled=self.compute_dtype != torch.float32):
            values = self.model(input_ids).float()
        index = _state_before_token(prompt_lengths, response_lengths, 0)
        return torch.where(action_mask(response_lengths), values.gather(1, index), 0.0)


def response_logprobs(
    model: nn.Module,
    prompt_ids: Sequence[np.ndarray],
    response_ids: Sequence[np.ndarray],
    *,
    temperature: float = 1.0,
    compute_dtype: torch.dtype = torch.float32,
    pad_token_id: int = 0,
    microbatch_size: int = 32,
) -> list[np.ndarray]:
    """Log-probs of each response's tokens given its prompt, float32, one array a row. No gradient."""
    module = LogprobModel(model, temperature=temperature, compute_dtype=compute_dtype)
    device = next(model.parameters()).device
    rows: list[np.ndarray] = []
    for start in range(0, len(prompt_ids), microbatch_size):
        part = slice(start, start + microbatch_size)
        batch = pad_rows(prompt_ids[part], response_ids[part], pad_token_id=pad_token_id, device=device)
        with torch.no_grad():
            padded = module(*batch).float().cpu().numpy()
        rows += [row[: len(response)] for row, response in zip(padded, response_ids[part], strict=True)]
    return rows
