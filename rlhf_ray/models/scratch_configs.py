"""The configs of models that start from random weights; `tables.families` names them."""

from __future__ import annotations

# The annotations of transformers' configs have lost the fields that a base class names.
# pyright: reportCallIssue=false, reportArgumentType=false
import math
from collections.abc import Mapping

from transformers import GPT2Config, LlamaConfig, PretrainedConfig, Qwen2Config

from rlhf_ray.config import FromScratch
from rlhf_ray.errors import UserError

TokenIds = Mapping[str, int | None]  # vocab_size, bos_token_id, eos_token_id, pad_token_id


def gpt2_config(shape: FromScratch, token_ids: TokenIds) -> PretrainedConfig:
    return GPT2Config(
        n_positions=shape.positions, n_embd=shape.width, n_layer=shape.layers, n_head=shape.heads,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        activation_function="gelu_pytorch_tanh",  # gelu_new's formula in one kernel
        **token_ids,
    )  # fmt: skip


def llama_config(shape: FromScratch, token_ids: TokenIds) -> PretrainedConfig:
    return _rotary(LlamaConfig, shape, token_ids)


def qwen2_config(shape: FromScratch, token_ids: TokenIds) -> PretrainedConfig:
    return _rotary(Qwen2Config, shape, token_ids)


def _rotary(kind: type[PretrainedConfig], shape: FromScratch, token_ids: TokenIds) -> PretrainedConfig:
    if shape.width // shape.heads % 2:
        raise UserError(
            f"model.from_scratch: width / heads = {shape.width // shape.heads} is odd, but {shape.architecture} "
            f"needs pairs of dimensions (rotary positions); try width {2 * shape.heads * max(shape.width // shape.heads // 2, 1)}"
        )
    return kind(
        hidden_size=shape.width,
        # A gated feed-forward has three matrices for GPT-2's two: 8/3 of the width keeps the parameters equal.
        intermediate_size=math.ceil(shape.width * 8 / 3 / 32) * 32,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads or shape.heads,
        max_position_embeddings=shape.positions,
        tie_word_embeddings=True,
        attention_dropout=0.0,
        **token_ids,
    )
