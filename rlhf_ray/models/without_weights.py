"""Models of which only the shape is there: for ranks that get their share of the weights from another one."""

from __future__ import annotations

from typing import Any

from accelerate import init_empty_weights
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights


def without_weights(auto: Any, config: PretrainedConfig, *, trust_remote_code: bool, **options: Any) -> PreTrainedModel:
    """A model of transformers' class `auto` with parameters on the meta device. Buffers (rotary angles, masks) are there."""
    with no_init_weights(), init_empty_weights(include_buffers=False):
        model = auto.from_config(config, trust_remote_code=trust_remote_code, **options)
    model.tie_weights()
    return model
