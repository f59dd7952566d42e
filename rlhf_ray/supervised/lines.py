"""Supervised batches without their padding, on CPUs.   B rows, S tokens of the longest, N tokens of them all, A of them read.

TRL's collators pad each batch to [B, S]. Half a batch's arithmetic can go into outputs that are not read: padding, the
prompt's positions in the head, and the last block's feed-forward wherever no state is read. Here the same rows are one
packed line of N tokens (`training.packing`), and the head and the last feed-forward run on A tokens. GPUs keep the plain
pass: their attention kernels take padding.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import cast

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

from rlhf_ray.algorithms.logprobs import selected_logprobs
from rlhf_ray.models.last_block import last_feed_forward, only_at
from rlhf_ray.supervised.rows import IGNORED
from rlhf_ray.training.classifier import line_logits, pack_classifier
from rlhf_ray.training.packing import Layout, line_inputs, pack


class LineLoss:
    """The language-model loss of padded rows, computed on a packed line."""

    def __init__(self, model: PreTrainedModel):
        """model: packed already (`training.packing.pack`), with `logits_to_keep` among its forward's arguments."""
        self._feed_forward = last_feed_forward(model)

    @classmethod
    def of(cls, model: PreTrainedModel) -> LineLoss | None:
        """None where the model can't read lines, or keeps no logits of single tokens."""
        keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        return cls(model) if keeps and pack(model) else None

    def summed(self, model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Negative log-likelihood of the labels in nats, summed: a scalar.

        model: the one given before, or a trainer's wrapper of it
        inputs: input_ids, attention_mask, labels, each [B, S], padded on the right
        """
        rows, starts = _rows(inputs)
        labelled = (inputs["labels"][:, 1:] != IGNORED) & inputs["attention_mask"][:, 1:].bool()
        row, before = labelled.nonzero(as_tuple=True)  # a label is read at the position before it
        states = starts[row] + before
        with only_at(self._feed_forward, states):
            logits = model(**line_inputs(rows, _layout(rows)), logits_to_keep=states, use_cache=False).logits
        logprobs = selected_logprobs(
            logits.squeeze(0), inputs["labels"][:, 1:][labelled], temperature=1.0
        )
        return -logprobs.sum()


def classify_lines(model: PreTrainedModel) -> bool:
    """Make a one-logit classifier score padded rows on a packed line, in place; False, and no change, where it can't.

    Rows end with EOS, which is not PAD (`load_tokenizer`): that is where their score is read.
    """
    if not pack_classifier(model):
        return False
    plain, feed_forward = model.forward, last_feed_forward(model)

    def forward(input_ids: torch.Tensor, attention_mask: torch.Tensor, **_) -> SequenceClassifierOutputWithPast:
        rows, starts = _rows({"input_ids": input_ids, "attention_mask": attention_mask})
        last = starts + torch.tensor([len(row) - 1 for row in rows])
        logits = line_logits(model, rows, last, feed_forward)
        return SequenceClassifierOutputWithPast(logits=cast(torch.FloatTensor, logits))  # or another dtype's: autocast

    forward.__signature__ = inspect.signature(plain)  # type: ignore[attr-defined]  # trainers decide by its arguments
    model.forward = forward
    return True


def _rows(inputs: Mapping[str, torch.Tensor]) -> tuple[list[np.ndarray], torch.Tensor]:
    """Each row without its padding, and the place of its first token on the line [B]."""
    lengths = inputs["attention_mask"].sum(1)
    rows = [ids[:length].numpy() for ids, length in zip(inputs["input_ids"], lengths.tolist(), strict=True)]
    return rows, lengths.cumsum(0) - lengths


def _layout(rows: list[np.ndarray]) -> Layout:
    return Layout.of(np.array([len(row) for row in rows]))
