"""Output layers in float32, whatever the body computes in: the score head of a reward model, and a language model's logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from rlhf_ray.errors import UserError
from rlhf_ray.models.load import score_head


class Float32Linear(nn.Linear):
    """A linear layer that autocast leaves alone. Weights in 16 bits are multiplied as float32."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.float(), self.weight.float(), None if self.bias is None else self.bias.float())


def score_in_float32(model: PreTrainedModel) -> PreTrainedModel:
    """Change the model in place so that its logits are float32 under autocast too; weights and names stay.

    A bfloat16 logit has 8 bits: scores of good models can differ by less, and would come out equal.
    """
    score_head(model).__class__ = Float32Linear
    return model


def logits_in_float32(model: PreTrainedModel, compute_dtype: torch.dtype) -> PreTrainedModel:
    """The same of a language model, for `ppo.float32_head`. UserError where its output layer is of a class of its own.

    compute_dtype: of the rest. Where that is float32 the layer stays what it is, for which there are faster ways on CPUs.
    """
    if compute_dtype == torch.float32:
        return model
    head = model.get_output_embeddings()
    if head is None or type(head) not in (nn.Linear, Float32Linear):
        raise UserError(
            f"ppo.float32_head is true, but the output layer of a {type(model).__name__} is a {type(head).__name__}, which may "
            "do more than multiply; set it to false"
        )
    head.__class__ = Float32Linear
    return model


def has_float32_head(model: PreTrainedModel) -> bool:
    return isinstance(model.get_output_embeddings(), Float32Linear)
