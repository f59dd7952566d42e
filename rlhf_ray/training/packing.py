"""Sequences of different lengths side by side on one line of tokens: padding exists inside attention only.

R sequences, N tokens of them all, S tokens of the longest, H heads, D channels per head. Everything but attention works on
tokens one by one, so it runs on the line [1, N]. For attention the line is laid out as [R, S] rows, each padded on the right,
where a causal mask keeps every sequence to itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import numpy as np
import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs
from transformers.masking_utils import sdpa_mask

from rlhf_ray.models.embeddings import embedding_rows
from rlhf_ray.tables.families import is_tested
from rlhf_ray.training.packed_attention import Layout, packed_attention

PACKED = "rlhf_ray_packed"

AttentionInterface.register(PACKED, packed_attention)
# With sdpa's own masks the model stays right for anyone who calls it without a layout.
AttentionMaskInterface.register(PACKED, sdpa_mask)


def pack(model: PreTrainedModel) -> bool:
    """Make the model (a causal LM or a body) read packed lines, in place; False, and no change, where it can't.

    It can where its layers attend over the whole sequence through transformers' attention interface and positions are given
    from outside. Others read rows padded on the right.
    """
    config = model.config.get_text_config(decoder=True)
    parameters = inspect.signature(model.forward).parameters
    passes_on = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())
    if not (model._supports_attention_backend and "position_ids" in parameters and passes_on):
        return False
    layer_types, _ = get_layer_types_and_kwargs(config)
    if any(kind != "full_attention" for kind in layer_types):
        return False
    before = model.config._attn_implementation
    if before not in ("eager", "sdpa", PACKED):
        return False
    model.set_attn_implementation(PACKED)
    # Any other family than the tested ones is compared once, when its module is built.
    if is_tested(config.model_type) or _reads_packed_lines(model):
        return True
    model.set_attn_implementation(before)
    return False


def line_inputs(
    ids: Sequence[np.ndarray], layout: Layout, device: torch.device | str = "cpu"
) -> dict[str, torch.Tensor | Layout]:
    """What a packed model's forward takes for these sequences."""
    positions = np.concatenate([np.arange(len(row)) for row in ids])
    return {
        "input_ids": torch.from_numpy(np.concatenate(ids).astype(np.int64))[None].to(device),
        "position_ids": torch.from_numpy(positions)[None].to(device),
        # Transformers makes no mask where it is given one with four dimensions; attention reads the layout instead.
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device),
        "packed": layout,
    }


@torch.no_grad()
def _reads_packed_lines(model: PreTrainedModel) -> bool:
    """Whether three sequences on a line give what each gives alone."""
    vocabulary = embedding_rows(model)
    rows = [np.arange(1, 1 + length) % vocabulary for length in (5, 2, 9)]
    was_training = model.training
    model.eval()
    try:
        layout = Layout.of(np.array([5, 2, 9]), model.device)
        line = model(**line_inputs(rows, layout, model.device), use_cache=False)[0][0]
        alone = [model(torch.from_numpy(row[None]).to(model.device), use_cache=False)[0][0] for row in rows]
    except (TypeError, ValueError):  # a layer that does not know the layout
        return False
    finally:
        model.train(was_training)
    alone = torch.cat(alone)
    return bool((line - alone).float().norm() < 1e-2 * alone.float().norm())
