"""The critic: a language model's body with a value for every position.   B rows, S tokens, D hidden size."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from rlhf_ray.models.load import (
    body_of,
    disable_dropout,
    load_causal_lm,
    load_reward_model,
    reward_normalisation,
    score_head,
)
from rlhf_ray.models.positions import position_ids_of


class Critic(nn.Module):
    """values[:, i] is the value of the state after token i has been read, that is, before token i + 1.

    So the value that belongs to (stands before) a row's token t is values[:, t - 1], and the T values of a response
    after P prompt tokens are values[:, P - 1 : P - 1 + T].
    """

    def __init__(self, backbone: PreTrainedModel):
        super().__init__()
        self.backbone = backbone
        self.config = backbone.config
        hidden = backbone.config.get_text_config().hidden_size
        self.value_head = nn.Linear(hidden, 1, dtype=torch.float32)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def forward(
        self,
        input_ids: torch.Tensor,  # [B, S]
        attention_mask: torch.Tensor | None = None,  # [B, S]; not needed where padding is on the right
        position_ids: torch.Tensor | None = None,  # [B, S]; follows from attention_mask
        **extra,  # for the body
    ) -> torch.Tensor:  # [B, S] float32
        if position_ids is None and attention_mask is not None:
            position_ids = position_ids_of(attention_mask)
        if position_ids is not None:
            extra["position_ids"] = position_ids
        hidden = self.backbone(input_ids, attention_mask=attention_mask, use_cache=False, **extra).last_hidden_state
        # Float32 also under autocast and in a bf16 engine: the third digit of a value counts in the loss.
        with torch.autocast(hidden.device.type, enabled=False):
            head = self.value_head
            return nn.functional.linear(hidden.float(), head.weight.float(), head.bias.float()).squeeze(-1)


def critic_from_reward_model(model: PreTrainedModel) -> Critic:
    """Starts at the normalised score: (w . hidden - reward_mean) / reward_std. The body is shared, not copied."""
    mean, std = reward_normalisation(model.config)
    head = score_head(model)
    critic = Critic(body_of(model))
    with torch.no_grad():
        critic.value_head.weight.copy_(head.weight.float() / std)
        bias = 0.0 if head.bias is None else head.bias.float()
        critic.value_head.bias.copy_((bias - mean) / std * torch.ones(1))
    disable_dropout(critic)
    return critic


def critic_from_causal_lm(model: PreTrainedModel) -> Critic:
    """Starts at value 0 everywhere. The body is shared with `model`, not copied."""
    critic = Critic(body_of(model))
    disable_dropout(critic)
    return critic


def build_critic(
    folder: str | Path,
    init: Literal["reward", "sft"],
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> Critic:
    """A critic from a reward model's folder ("reward") or a causal LM's ("sft"); its head is always float32."""
    if init == "reward":
        return critic_from_reward_model(load_reward_model(folder, dtype, trust_remote_code))
    return critic_from_causal_lm(load_causal_lm(folder, dtype, trust_remote_code))
