"""Rows of a model's embeddings, one per token."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def fit_embeddings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Add the embedding rows that the tokenizer's newest tokens (an added PAD) need; returns how many.

    Checkpoints often hold more rows than tokens; then nothing changes. New rows are the mean of the old ones.
    """
    rows = embedding_rows(model)
    if len(tokenizer) <= rows:
        return 0
    # mean_resizing draws the rows at random, from a distribution it fits to all the others: slow and unseeded.
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    layers = [layer for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer is not None]
    with torch.no_grad():
        for weight in {id(weight): weight for weight in map(_weight, layers)}.values():  # one where the two are tied
            weight[rows:] = weight[:rows].mean(0)
    return len(tokenizer) - rows


def embedding_rows(model: PreTrainedModel) -> int:
    """Rows of the input embeddings: at least as many as the tokenizer has tokens."""
    return _weight(model.get_input_embeddings()).shape[0]


def _weight(layer: nn.Module) -> torch.Tensor:
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    return weight
