"""Runs the last block's feed-forward only where its output is read.   N tokens, A of them read, D hidden size.

A policy's or critic's loss reads only the states before the response's tokens, a reward model's score one state per
row. Every block except the last needs all tokens, for the next one's keys and values. In the last one the feed-forward,
two thirds of a block's weights, can skip the others. No number that is read changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from rlhf_ray.tables.families import is_tested


class _Select(torch.autograd.Function):
    """[N, D] -> [A, D]: index_select for distinct places. Torch's gradient allows repeats, row by row on CPUs."""

    @staticmethod
    def forward(ctx: Any, line: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(places)
        ctx.tokens = len(line)
        return line.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (places,) = ctx.saved_tensors
        return gradient.new_zeros(ctx.tokens, gradient.shape[1]).index_copy_(0, places, gradient), None


def last_feed_forward(model: PreTrainedModel) -> nn.Module | None:
    """The last block's feed-forward, for `only_at`; None: the family is not tested, or the backward pass recomputes it.

    model: a causal LM or a body, adapters or not.
    """
    config = model.config.get_text_config(decoder=True)
    # The feed-forward of a tested family works on each token by itself (tests/test_forward.py).
    if not is_tested(config.model_type) or model.is_gradient_checkpointing:
        return None
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    blocks = [stack[-1] for stack in stacks if len(stack) == config.num_hidden_layers and "mlp" in dict(stack[-1].named_children())]
    return blocks[0].get_submodule("mlp") if len(blocks) == 1 else None


@contextmanager
def only_at(feed_forward: nn.Module | None, places: torch.Tensor) -> Iterator[None]:
    """Inside, feed_forward works on the tokens at places [A] (distinct, on the flat [N, D]) and gives 0 elsewhere."""
    if feed_forward is None:
        yield
        return

    shape = torch.Size()

    def select(_, inputs):
        nonlocal shape
        shape = inputs[0].shape
        return (_Select.apply(inputs[0].flatten(0, 1), places)[None],)

    def spread(_, inputs, output):
        return output.new_zeros(shape.numel() // shape[-1], shape[-1]).index_copy(0, places, output[0]).view(shape)

    hooks = [feed_forward.register_forward_pre_hook(select), feed_forward.register_forward_hook(spread)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
