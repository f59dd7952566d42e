"""The decode step of known families, written out.   n rows of one token each, H key-value heads, D channels a head, V vocabulary.

It calls the model's own modules for all that has weights, so it never holds a copy of any and rounds as the model does. What
is left out is the rest of the model's `forward`: masks, decorators and shapes for sequences, a tenth of a small model's step on
CPUs (measured: results/bench/trials.py).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import GPT2LMHeadModel, LlamaForCausalLM, PreTrainedModel, Qwen2ForCausalLM

from rlhf_ray.engines.kv_cache import RaggedCache, plain_products, score_offsets

# (model, cache, tokens [n], positions [n], mask [n, 1, 1, C] bool) -> logits [n, V]
DecodeStep = Callable[[PreTrainedModel, RaggedCache, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def decode_step_of(model: PreTrainedModel) -> DecodeStep | None:
    """None: of another family (or a class of its own), so `forward` is what there is."""
    if type(model) is GPT2LMHeadModel and not model.config.add_cross_attention:
        return gpt2_step
    if type(model) in (LlamaForCausalLM, Qwen2ForCausalLM):
        return llama_step
    return None


def gpt2_step(model, cache, tokens, positions, mask) -> torch.Tensor:
    body, n = model.transformer, len(tokens)
    hidden = body.wte(tokens) + body.wpe(positions)
    offsets = score_offsets(mask, model.config.num_attention_heads, hidden.dtype)
    for block, layer in zip(body.h, cache.layers, strict=True):
        attention = block.attn
        lines = attention.c_attn(block.ln_1(hidden)).view(n, 3, attention.num_heads, 1, attention.head_dim)
        query, key, value = lines.unbind(1)  # [n, H, 1, D] each
        mixed = plain_products(query, *layer.update(key, value), offsets, attention.scaling)
        hidden = hidden + attention.c_proj(mixed.view(n, -1))
        hidden = hidden + block.mlp(block.ln_2(hidden))
    return model.lm_head(body.ln_f(hidden))


def llama_step(model, cache, tokens, positions, mask) -> torch.Tensor:
    """Qwen2's too: its projections have biases."""
    body, n = model.model, len(tokens)
    hidden = body.embed_tokens(tokens)
    cos, sin = body.rotary_emb(hidden, positions[:, None])  # [n, 1, D]
    offsets = score_offsets(mask, model.config.num_key_value_heads, hidden.dtype)
    for block, layer in zip(body.layers, cache.layers, strict=True):
        attention, normed = block.self_attn, block.input_layernorm(hidden)
        query, key, value = (
            project(normed).view(n, -1, attention.head_dim)  # [n, heads, D]; key and value: [n, H, D]
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        key, value = layer.update(_turned(key, cos, sin)[:, :, None], value[:, :, None])
        query = _turned(query, cos, sin).view(n, key.shape[1], -1, attention.head_dim)
        mixed = plain_products(query, key, value, offsets, attention.scaling)
        hidden = hidden + attention.o_proj(mixed.view(n, -1))
        hidden = hidden + block.mlp(block.post_attention_layernorm(hidden))
    return model.lm_head(body.norm(hidden))


def _turned(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions: channel i and channel i + D/2 turn together.   states [n, heads, D], cos and sin [n, 1, D]"""
    first, second = states.chunk(2, -1)
    return states * cos + torch.cat((-second, first), -1) * sin
