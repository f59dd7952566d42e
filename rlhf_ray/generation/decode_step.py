"""The decode step of known families, written out.   n rows of one token each, H key-value heads, D channels per head, V vocabulary.

It calls the model's own modules for all that has weights, so it never holds a copy of any and rounds as the model does. What
is left out is the rest of the model's `forward`: masks, decorators and shapes for sequences, a tenth of a small model's step on
CPUs (measured: rlhf_ray/bench/trials.py). What a step does beside those modules is in `Operations`: by torch; `cpu` has others.
"""

from __future__ import annotations

# Layers of transformers are changed in place, which their annotations do not know.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportOptionalSubscript=false, reportOptionalMemberAccess=false, reportReturnType=false
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from transformers import GPT2LMHeadModel, LlamaForCausalLM, PreTrainedModel, Qwen2ForCausalLM

from rlhf_ray.generation.kv_cache import RaggedCache, plain_products, score_offsets

# (model, cache, tokens [n], positions [n], operations) -> logits [n, V]
WrittenOut = Callable[[PreTrainedModel, RaggedCache, torch.Tensor, torch.Tensor, "Operations"], torch.Tensor]


class DecodeStep:
    """A model's decode step over rows of a cache, by torch's operations."""

    def __init__(self, model: PreTrainedModel, written_out: WrittenOut):
        self.model, self.written_out = model, written_out
        self.operations = Operations()

    def __call__(self, cache: RaggedCache, tokens: np.ndarray, positions: np.ndarray) -> torch.Tensor:
        """Feed tokens [n] at positions [n]; -> logits [n, V], which the next call may write over."""
        inputs = torch.from_numpy(np.stack([tokens, positions]))
        cache.begin_decode(inputs[1], cache.write.slots)
        return self.written_out(self.model, cache, inputs[0], inputs[1], self.operations)

    def forget(self) -> None:
        """Give back what steps over a cache leave behind: nothing."""


class Operations:
    """What a decode step does beside the modules that have weights."""

    def embed(self, tokens, positions, words: nn.Module, places: nn.Module | None = None) -> torch.Tensor:
        return words(tokens) if places is None else words(tokens) + places(positions)

    def add_and_normalise(self, hidden: torch.Tensor, change: torch.Tensor | None, norm: nn.Module) -> torch.Tensor:
        """norm(hidden) after the change, if there is one, is added to hidden, in place."""
        return norm(hidden if change is None else hidden.add_(change))

    def turn(self, states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Rotary positions of states [n, heads, D], maybe in place, by tables of cosines and sines [positions, D]."""
        return _turned(states, cos[positions][:, None], sin[positions][:, None])

    def attention(self, cache: RaggedCache, dtype: torch.dtype, groups: int, channels: int) -> Callable[..., torch.Tensor]:
        """How the decode step that has begun attends, the same in every layer of H groups and D channels.

        -> (layer, query [n, heads, D], key and value [n, H, D], scaling) -> [n, heads * D]
        """
        targets, length = cache.write.targets, cache.write.length
        mask = (torch.arange(length, device=targets.device) <= targets[:, None])[:, None, None]
        offsets = score_offsets(mask, groups, dtype)

        def attend(layer, query, key, value, scaling):
            keys, values = layer.update(key[:, :, None], value[:, :, None])
            query = query.reshape(len(query), groups, -1, channels)
            return plain_products(query, keys, values, offsets, scaling).view(len(query), -1)

        return attend


def decode_step_of(model: PreTrainedModel) -> DecodeStep | None:
    """None: of another family (or a class of its own), so `forward` is what there is."""
    if type(model) is GPT2LMHeadModel and not model.config.add_cross_attention:
        return DecodeStep(model, gpt2_step)
    if type(model) in (LlamaForCausalLM, Qwen2ForCausalLM):
        return DecodeStep(model, LlamaStep())
    return None


def gpt2_step(model, cache, tokens, positions, operations) -> torch.Tensor:
    body, n = model.transformer, len(tokens)
    hidden, change = operations.embed(tokens, positions, body.wte, body.wpe), None
    first = body.h[0].attn
    attend = operations.attention(cache, hidden.dtype, first.num_heads, first.head_dim)
    for block, layer in zip(body.h, cache.layers, strict=True):
        attention = block.attn
        lines = attention.c_attn(operations.add_and_normalise(hidden, change, block.ln_1))
        query, key, value = lines.view(n, 3, attention.num_heads, attention.head_dim).unbind(1)
        change = attention.c_proj(attend(layer, query, key, value, attention.scaling))
        change = block.mlp(operations.add_and_normalise(hidden, change, block.ln_2))
    return model.lm_head(operations.add_and_normalise(hidden, change, body.ln_f))


class LlamaStep:
    """Qwen2's too: its projections have biases."""

    def __init__(self):
        # Cosines and sines of each position, [positions, D].
        self._angles: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(self, model, cache, tokens, positions, operations) -> torch.Tensor:
        body, n = model.model, len(tokens)
        hidden, change = operations.embed(tokens, positions, body.embed_tokens), None
        turn = self._rotary(body.rotary_emb, hidden, positions, cache.write.slots, operations)
        channels = body.layers[0].self_attn.head_dim
        attend = operations.attention(cache, hidden.dtype, model.config.num_key_value_heads, channels)
        for block, layer in zip(body.layers, cache.layers, strict=True):
            attention, normed = block.self_attn, operations.add_and_normalise(hidden, change, block.input_layernorm)
            query, key, value = (
                project(normed).view(n, -1, channels)  # [n, heads, D]; key and value: [n, H, D]
                for project in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            mixed = attend(layer, turn(query), turn(key), value, attention.scaling)
            change = attention.o_proj(mixed)
            change = block.mlp(operations.add_and_normalise(hidden, change, block.post_attention_layernorm))
        return model.lm_head(operations.add_and_normalise(hidden, change, body.norm))

    def _rotary(
        self, rotary: nn.Module, hidden, positions, slots: int, operations: Operations
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """What turns states [n, heads, D] by their rows' positions, maybe in place."""
        if rotary.rope_type not in FIXED_ANGLES:
            cos, sin = rotary(hidden, positions[:, None])  # [n, 1, D]
            return lambda states: _turned(states, cos, sin)
        if self._angles is None or len(self._angles[0]) < slots or self._angles[0].dtype != hidden.dtype:
            everywhere = rotary(hidden, torch.arange(slots, device=hidden.device)[None])
            self._angles = tuple(each[0].contiguous() for each in everywhere)
        cos, sin = self._angles
        return lambda states: operations.turn(states, cos, sin, positions)


# Of rotary positions: a position's angles do not depend on how long a sequence is.
FIXED_ANGLES = ("default", "linear", "llama3", "yarn")


def _turned(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions: channel i and channel i + D/2 turn together.   states [n, heads, D], cos and sin [n, 1, D]"""
    first, second = states.chunk(2, -1)
    return states * cos + torch.cat((-second, first), -1) * sin
