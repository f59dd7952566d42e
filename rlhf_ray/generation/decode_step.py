"""The decode step of known families, written out.   n rows of one token each, H key-value heads, D channels a head, V vocabulary.

It calls the model's own modules for all that has weights, so it never holds a copy of any and rounds as the model does. What
is left out is the rest of the model's `forward`: masks, decorators and shapes for sequences, a tenth of a small model's step on
CPUs (measured: rlhf_ray/bench/trials.py).
"""

from __future__ import annotations

# Layers of transformers are changed in place, which their annotations do not know.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportOptionalSubscript=false, reportOptionalMemberAccess=false, reportReturnType=false
from collections.abc import Callable

import torch
from torch import nn
from transformers import GPT2LMHeadModel, LlamaForCausalLM, PreTrainedModel, Qwen2ForCausalLM

from rlhf_ray.cpu.kernels import kernel
from rlhf_ray.generation.kv_cache import RaggedCache

# (model, cache, tokens [n], positions [n]) -> logits [n, V]
DecodeStep = Callable[[PreTrainedModel, RaggedCache, torch.Tensor, torch.Tensor], torch.Tensor]


def decode_step_of(model: PreTrainedModel) -> DecodeStep | None:
    """None: of another family (or a class of its own), so `forward` is what there is."""
    if type(model) is GPT2LMHeadModel and not model.config.add_cross_attention:
        return gpt2_step
    if type(model) in (LlamaForCausalLM, Qwen2ForCausalLM):
        return LlamaStep()
    return None


def gpt2_step(model, cache, tokens, positions) -> torch.Tensor:
    body, n = model.transformer, len(tokens)
    hidden, change = _embed(tokens, positions, body.wte, body.wpe), None
    first = body.h[0].attn
    attend = cache.decode_attention(hidden.dtype, first.num_heads, first.head_dim)
    for block, layer in zip(body.h, cache.layers, strict=True):
        attention = block.attn
        lines = attention.c_attn(_add_and_normalise(hidden, change, block.ln_1))
        query, key, value = lines.view(n, 3, attention.num_heads, attention.head_dim).unbind(1)
        change = attention.c_proj(attend(layer, query, key, value, attention.scaling))
        change = block.mlp(_add_and_normalise(hidden, change, block.ln_2))
    return model.lm_head(_add_and_normalise(hidden, change, body.ln_f))


class LlamaStep:
    """Qwen2's too: its projections have biases."""

    def __init__(self):
        # Cosines and sines of each position, [positions, D].
        self._angles: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(self, model, cache, tokens, positions) -> torch.Tensor:
        body, n = model.model, len(tokens)
        hidden, change = _embed(tokens, positions, body.embed_tokens), None
        turn = self._rotary(body.rotary_emb, hidden, positions, cache.write.slots)
        channels = body.layers[0].self_attn.head_dim
        attend = cache.decode_attention(hidden.dtype, model.config.num_key_value_heads, channels)
        for block, layer in zip(body.layers, cache.layers, strict=True):
            attention, normed = block.self_attn, _add_and_normalise(hidden, change, block.input_layernorm)
            query, key, value = (
                project(normed).view(n, -1, channels)  # [n, heads, D]; key and value: [n, H, D]
                for project in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            mixed = attend(layer, turn(query), turn(key), value, attention.scaling)
            change = attention.o_proj(mixed)
            change = block.mlp(_add_and_normalise(hidden, change, block.post_attention_layernorm))
        return model.lm_head(_add_and_normalise(hidden, change, body.norm))

    def _rotary(self, rotary: nn.Module, hidden, positions, slots: int) -> Callable[[torch.Tensor], torch.Tensor]:
        """What turns states [n, heads, D] by their rows' positions, maybe in place."""
        if rotary.rope_type not in FIXED_ANGLES:
            cos, sin = rotary(hidden, positions[:, None])  # [n, 1, D]
            return lambda states: _turned(states, cos, sin)
        if self._angles is None or len(self._angles[0]) < slots or self._angles[0].dtype != hidden.dtype:
            everywhere = rotary(hidden, torch.arange(slots, device=hidden.device)[None])
            self._angles = tuple(each[0].contiguous() for each in everywhere)
        cos, sin = self._angles
        run = kernel("turn", cos, sin, positions, dtype=hidden.dtype)
        if run is None:
            return lambda states: _turned(states, cos[positions][:, None], sin[positions][:, None])

        def turn(states):
            run(states, cos, sin, positions, *states.shape)
            return states

        return turn


# Of rotary positions: a position's angles do not depend on how long a sequence is.
FIXED_ANGLES = ("default", "linear", "llama3", "yarn")


def _embed(tokens, positions, words: nn.Module, places: nn.Module | None = None) -> torch.Tensor:
    tables = [words.weight, None if places is None else places.weight]
    run = kernel("embed", *tables, tokens, positions, dtype=words.weight.dtype)
    plain = all(each is None or (type(each) is nn.Embedding and each.max_norm is None) for each in (words, places))
    if run is None or not plain or tables[1] is not None and tables[1].dtype != tables[0].dtype:
        return words(tokens) if places is None else words(tokens) + places(positions)
    result = tables[0].new_empty(len(tokens), tables[0].shape[1])
    run(*tables, tokens, positions, result, *result.shape)
    return result


def _add_and_normalise(hidden: torch.Tensor, change: torch.Tensor | None, norm: nn.Module) -> torch.Tensor:
    """norm(hidden) after the change, if there is one, is added to hidden, in place."""
    weight, bias = norm.weight, getattr(norm, "bias", None)  # RMS norms have none
    run = kernel("add_and_normalise", hidden, change, weight, bias, dtype=hidden.dtype)
    alike = weight.dtype == hidden.dtype and (change is None or change.dtype == hidden.dtype)  # not so under autocast
    if run is None or not alike:
        return norm(hidden if change is None else hidden.add_(change))
    result = torch.empty_like(hidden)
    eps = norm.variance_epsilon if bias is None else norm.eps
    run(hidden, change, weight, bias, result, *hidden.shape, eps)
    return result


def _turned(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions: channel i and channel i + D/2 turn together.   states [n, heads, D], cos and sin [n, 1, D]"""
    first, second = states.chunk(2, -1)
    return states * cos + torch.cat((-second, first), -1) * sin
