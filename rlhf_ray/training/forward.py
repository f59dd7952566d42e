"""Log-probs and values of given responses under a model.   B rows, P prompt, T response, S = P + T, A action tokens.

Rows are packed (`training.packing`) where the model can read them so, and padded on the right where it can't. Either way no
token sees another row or any padding, and positions are 0, 1, 2, ... for every row: left padding's silent position errors
can't happen.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import nn

from rlhf_ray.algorithms.chunked_head import head_logprobs_and_entropy
from rlhf_ray.algorithms.logprobs import selected_logprobs, selected_logprobs_and_entropy
from rlhf_ray.algorithms.schedule import cut_microbatches
from rlhf_ray.messages import Support
from rlhf_ray.models.critic import Critic
from rlhf_ray.models.float_head import has_float32_head
from rlhf_ray.models.last_block import last_feed_forward, only_at
from rlhf_ray.models.load import body_of
from rlhf_ray.tables.families import is_tested
from rlhf_ray.training.packing import Layout, line_inputs, pack
from rlhf_ray.training.padding import action_mask

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """Prompts with their responses, as a module's forward takes them."""

    inputs: dict[str, Any]  # of the model: packed, or padded to [B, S]
    states: torch.Tensor  # [A] where the state before each response token stands, in order of rows, on the flat inputs
    targets: torch.Tensor  # [A] int64, the response tokens
    response_lengths: torch.Tensor  # [B]
    #: what each response token was drawn among after top_k, top_p and min_p: [M] places in `states`, [M] token ids; None: all
    support: tuple[torch.Tensor, torch.Tensor] | None = None

    def support_mask(self, logits: torch.Tensor) -> torch.Tensor | None:
        """bool [A, V]"""
        if self.support is None:
            return None
        mask = torch.zeros_like(logits, dtype=torch.bool)
        mask[self.support] = True
        return mask

    @cached_property
    def action_mask(self) -> torch.Tensor:
        return action_mask(self.response_lengths)

    def in_rows(self, values: torch.Tensor) -> torch.Tensor:
        """[A] -> [B, T], zeros on the right."""
        return torch.zeros(self.action_mask.shape, dtype=values.dtype, device=values.device).masked_scatter(
            self.action_mask, values
        )


def token_batch(
    prompts: Sequence[np.ndarray],
    responses: Sequence[np.ndarray],
    supports: Sequence[Support] | None = None,
    *,
    packed: bool,
    device: torch.device | str = "cpu",
) -> TokenBatch:
    """supports: of each row, where its tokens were not drawn among all."""
    rows = [np.concatenate([prompt, response]) for prompt, response in zip(prompts, responses, strict=True)]
    lengths = np.array([len(row) for row in rows])
    responded = np.array([len(response) for response in responses])
    if packed:
        inputs = line_inputs(rows, Layout.of(lengths, device), device)
        starts = np.cumsum(lengths) - lengths
    else:
        padded = np.zeros((len(rows), lengths.max()), np.int64)
        for out, row in zip(padded, rows, strict=True):
            out[: len(row)] = row
        inputs = {"input_ids": torch.from_numpy(padded).to(device)}
        starts = np.arange(len(rows)) * lengths.max()
    before = starts + lengths - responded - 1  # of each row, the prompt's last token
    states = np.concatenate([first + np.arange(count) for first, count in zip(before, responded, strict=True)])
    return TokenBatch(
        inputs=inputs,
        states=torch.from_numpy(states).to(device),
        targets=torch.from_numpy(np.concatenate(responses).astype(np.int64)).to(device),
        response_lengths=torch.from_numpy(responded).to(device),
        support=None if supports is None else _places_and_ids(supports, device),
    )


def _places_and_ids(supports: Sequence[Support], device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
    counts = np.concatenate([support.counts for support in supports])
    ids = np.concatenate([support.ids for support in supports]).astype(np.int64)
    return torch.from_numpy(np.repeat(np.arange(len(counts)), counts)).to(device), torch.from_numpy(ids).to(device)


class LogprobModel(nn.Module):
    """A causal LM whose forward returns response log-probs [B, T] (and entropy), not logits.

    DeepSpeed needs a module whose forward does the work (ZeRO-3 gathers there). Logits are computed for the response's
    tokens only, in the compute dtype; the softmax is float32. Entropies for a loss come from the states instead, with few logits
    at a time (`algorithms.chunked_head`), except under ZeRO-3, which gathers the output layer for one product only.
    """

    def __init__(
        self, model: PreTrainedModel, *, temperature: float, compute_dtype: torch.dtype, entropy_gradient: bool = False
    ):
        """entropy_gradient: whether entropies are for a loss, too (a `PolicyTrainer` with such a loss sets it)."""
        super().__init__()
        self.model = model
        self.temperature = temperature
        self.compute_dtype = compute_dtype
        self.packed = pack(model)
        self.entropy_gradient = entropy_gradient
        self._only_at = partial(only_at, last_feed_forward(model))  # as an attribute it would double its weights' names
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._head_is_plain = is_tested(model.config.get_text_config(decoder=True).model_type)  # states @ weight.T, and no more

    def forward(self, batch: TokenBatch, with_entropy: bool = False):
        if with_entropy and self.entropy_gradient and self._head_is_whole():  # in passes without gradient, too: all round alike
            return self._from_states(batch)
        keep = {"logits_to_keep": batch.states} if "packed" in batch.inputs and self._keeps_logits else {}
        with self._computing(batch):
            logits = self.model(**batch.inputs, **keep, use_cache=False).logits
        logits = logits.squeeze(0) if keep else logits.flatten(0, 1)[batch.states]  # [A, V]
        options: Any = {"temperature": self.temperature, "support": batch.support_mask(logits)}
        if not with_entropy:
            return batch.in_rows(selected_logprobs(logits, batch.targets, **options))
        both = selected_logprobs_and_entropy(logits, batch.targets, entropy_gradient=self.entropy_gradient, **options)
        return tuple(batch.in_rows(each) for each in both)

    def _head_is_whole(self) -> bool:
        head = self.model.get_output_embeddings()
        # hasattr: ZeRO-3 marks the weights that it cuts.
        return self._head_is_plain and isinstance(head, nn.Linear) and head.bias is None and not hasattr(head.weight, "ds_id")

    def _from_states(self, batch: TokenBatch) -> tuple[torch.Tensor, ...]:
        with self._computing(batch):
            states = body_of(self.model)(**batch.inputs, use_cache=False).last_hidden_state
        dtype = torch.float32 if has_float32_head(self.model) else self.compute_dtype
        both = head_logprobs_and_entropy(
            states.flatten(0, 1)[batch.states], cast(nn.Linear, self.model.get_output_embeddings()).weight, batch.targets,
            temperature=self.temperature, compute_dtype=dtype, support=batch.support,
        )  # fmt: skip
        return tuple(batch.in_rows(each) for each in both)

    @contextmanager
    def _computing(self, batch: TokenBatch) -> Iterator[None]:
        device = batch.states.device
        autocast = torch.autocast(device.type, self.compute_dtype, enabled=self.compute_dtype != torch.float32)
        with autocast, self._only_at(batch.states):
            yield


class ValueModel(nn.Module):
    """A critic whose forward returns the value [B, T] of the state before each response token."""

    def __init__(self, critic: Critic, *, compute_dtype: torch.dtype):
        super().__init__()
        self.model = critic
        self.compute_dtype = compute_dtype
        self.packed = pack(critic.backbone)
        self._only_at = partial(only_at, last_feed_forward(critic.backbone))

    def forward(self, batch: TokenBatch):
        device = batch.states.device
        autocast = torch.autocast(device.type, self.compute_dtype, enabled=self.compute_dtype != torch.float32)
        with autocast, self._only_at(batch.states):
            values = self.model(**batch.inputs).float()
        return batch.in_rows(values.flatten()[batch.states])


def response_logprobs(
    model: PreTrainedModel,
    prompt_ids: Sequence[np.ndarray],
    response_ids: Sequence[np.ndarray],
    supports: Sequence[Support] | None = None,
    *,
    temperature: float = 1.0,
    compute_dtype: torch.dtype = torch.float32,
    microbatch_size: int = 32,
    microbatch_tokens: int | None = None,
) -> list[np.ndarray]:
    """Log-probs of each response's tokens given its prompt, float32, one array per row. No gradient.

    supports: of each row, where its tokens were not drawn among all: the log-probs are renormalised over them.
    A forward pass takes microbatch_size rows or, if given, as many as microbatch_tokens holds.
    """
    module = LogprobModel(model, temperature=temperature, compute_dtype=compute_dtype)
    return module_logprobs(
        module, prompt_ids, response_ids, supports, microbatch_size=microbatch_size, microbatch_tokens=microbatch_tokens
    )


@torch.no_grad()
def module_logprobs(
    module: LogprobModel,
    prompt_ids: Sequence[np.ndarray],
    response_ids: Sequence[np.ndarray],
    supports: Sequence[Support] | None = None,
    *,
    microbatch_size: int,
    microbatch_tokens: int | None = None,
) -> list[np.ndarray]:
    """As `response_logprobs`, by a module that is there already."""
    device = next(module.parameters()).device
    lengths = [len(prompt) + len(response) for prompt, response in zip(prompt_ids, response_ids, strict=True)]
    found: dict[int, np.ndarray] = {}
    for rows in cut_microbatches(lengths, size=microbatch_size, tokens=microbatch_tokens):
        prompts, responses = [prompt_ids[row] for row in rows], [response_ids[row] for row in rows]
        among = None if supports is None else [supports[row] for row in rows]
        batch = token_batch(prompts, responses, among, packed=module.packed, device=device)
        padded = module(batch).float().cpu().numpy()
        found |= {row: line[: len(response)] for row, line, response in zip(rows, padded, responses, strict=True)}
    return [found[row] for row in range(len(lengths))]
