"""The decode step of known families, written out.   n rows of one token each, H key-value heads, D channels a head, V vocabulary.

It calls the model's own modules for all that has weights, so it never holds a copy of any and rounds as the model does. What
is left out is the rest of the model's `forward`: masks, decorators and shapes for sequences, a tenth of a small model's step on
CPUs (measured: results/bench/trials.py).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers import GPT2LMHeadModel, LlamaForCausalLM, PreTrainedModel, Qwen2ForCausalLM

from rlhf_ray.engines.kv_cache import RaggedCache
from rlhf_ray.kernels import kernel

# (model, cache, tokens [n], positions [n]) -> logits [n, V]
DecodeStep = Callable[[PreTrainedModel, RaggedCache, torch.Tensor, torch.Tensor], torch.Tensor]


def decode_step_of(model: PreTrainedModel) -> DecodeStep | None:
    """None: of another family (or a class of its own), so `forward` is what there is."""
    if type(model) is GPT2LMHeadModel and not model.config.add_cross_attention:
        return gpt2_step
    if type(model) in (LlamaForCausalLM, Qwen2ForCausalLM):
        return llama_step
    return None


def gpt2_step(model, cache, tokens, positions) -> torch.Tensor:
    body, n = model.transformer, len(tokens)
    hidden, change = body.wte(tokens) + body.wpe(positions), None
    first = body.h[0].attn
    attend = cache.decode_attention(hidden.dtype, first.num_heads, first.head_dim)
    for block, layer in zip(body.h, cache.layers, strict=True):
        attention = block.attn
        lines = attention.c_attn(_add_and_normalise(hidden, change, block.ln_1))
        query, key, value = lines.view(n, 3, attention.num_heads, attention.head_dim).unbind(1)
        change = attention.c_proj(attend(layer, query, key, value, attention.scaling))
        change = block.mlp(_add_and_normalise(hidden, change, block.ln_2))
    return model.lm_head(_add_and_normalise(hidden, change, body.ln_f))


def llama_step(model, cache, tokens, positions) -> torch.Tensor:
    """Qwen2's too: its projections have biases."""
    body, n = model.model, len(tokens)
    hidden, change = body.embed_tokens(tokens), None
    cos, sin = body.rotary_emb(hidden, positions[:, None])  # [n, 1, D]
    attend = cache.decode_attention(hidden.dtype, model.config.num_key_value_heads, cos.shape[-1])
    for block, layer in zip(body.layers, cache.layers, strict=True):
        attention, normed = block.self_attn, _add_and_normalise(hidden, change, block.input_layernorm)
        query, key, value = (
            project(normed).view(n, -1, attention.head_dim)  # [n, heads, D]; key and value: [n, H, D]
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        mixed = attend(layer, _turned(query, cos, sin), _turned(key, cos, sin), value, attention.scaling)
        change = attention.o_proj(mixed)
        change = block.mlp(_add_and_normalise(hidden, change, block.post_attention_layernorm))
    return model.lm_head(_add_and_normalise(hidden, change, body.norm))


def _add_and_normalise(hidden: torch.Tensor, change: torch.Tensor | None, norm: nn.Module) -> torch.Tensor:
    """norm(hidden) after the change, if there is one, is added to hidden, in place."""
    weight, bias = norm.weight, getattr(norm, "bias", None)  # RMS norms have none
    run = kernel("add_and_normalise", hidden, change, weight, bias, dtype=hidden.dtype)
    if run is None or weight.dtype != hidden.dtype:
        return norm(hidden if change is None else hidden.add_(change))
    result = torch.empty_like(hidden)
    eps = norm.variance_epsilon if bias is None else norm.eps
    run(hidden, change, weight, bias, result, *hidden.shape, eps)
    return result


def _turned(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions: channel i and channel i + D/2 turn together.   states [n, heads, D], cos and sin [n, 1, D]"""
    first, second = states.chunk(2, -1)
    return states * cos + torch.cat((-second, first), -1) * sin
