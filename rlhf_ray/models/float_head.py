"""The score head of a reward model in float32, whatever the body computes in."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from rlhf_ray.models.load import score_head


class Float32Linear(nn.Linear):
    """A linear layer that autocast leaves alone."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.float(), self.weight.float(), None if self.bias is None else self.bias.float())


def score_in_float32(model: PreTrainedModel) -> PreTrainedModel:
    """Change the model in place so that its logits are float32 under autocast too; weights and names stay.

    A bfloat16 logit has 8 bits: scores of good models can differ by less, and would come out equal.
    """
    score_head(model).__class__ = Float32Linear
    return model
