"""Scores of one-logit classifiers on packed lines.   R rows, N tokens of them all, D hidden size."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from rlhf_ray.models.last_block import only_at
from rlhf_ray.models.load import body_of, score_head
from rlhf_ray.tables.families import FAMILIES
from rlhf_ray.training.packing import Layout, line_inputs, pack


def pack_classifier(model: PreTrainedModel) -> bool:
    """Make the model's body read packed lines, in place; False, and no change, where `line_logits` would not be its scores.

    A class that does something else with its body's output than to apply its head at one token has to read rows.
    """
    family = FAMILIES.get(type(model).__name__.removesuffix("ForSequenceClassification").lower())
    return family is not None and family.scores_at_one_token and pack(body_of(model))


def line_logits(
    model: PreTrainedModel,
    rows: Sequence[np.ndarray],
    places: torch.Tensor,  # [R] of the token where each row's score is read, on the line
    feed_forward: nn.Module | None,  # `last_feed_forward(model)`
) -> torch.Tensor:
    """[R, 1], of a model that `pack_classifier` has packed. The last feed-forward runs at `places` only."""
    layout = Layout.of(np.array([len(row) for row in rows]), places.device)
    with only_at(feed_forward, places):
        hidden = body_of(model)(**line_inputs(rows, layout, places.device), use_cache=False).last_hidden_state[0]
    return score_head(model)(hidden[places])
