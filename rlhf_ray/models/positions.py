"""Positions of tokens, and how many a model has.   B rows, S tokens."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig

from rlhf_ray.errors import UserError


def position_ids_of(attention_mask: torch.Tensor) -> torch.Tensor:
    """Positions 0, 1, 2, ... of the visible tokens, wherever the padding stands.   [B, S] -> [B, S]

    Without them GPT-2 counts positions from the left edge of the row, padding included: every left-padded row is then
    wrong, and no error says so.
    """
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def positions_of(config: PretrainedConfig) -> int | None:
    """The longest sequence of a model, in tokens. None: its family has no limit."""
    # getattr: families name their options as they like, and transformers has no type for all of them.
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def check_positions(
    config: PretrainedConfig, longest: int, what: str = "data.max_prompt_tokens + generation.max_new_tokens"
) -> None:
    """Raise UserError if `longest` tokens are more than the model has positions for."""
    positions = positions_of(config)
    if positions is not None and longest > positions:
        raise UserError(
            f"{what} = {longest} tokens is longer than the model's {positions} positions; lower it to {positions}, "
            "or choose a model with more positions"
        )
