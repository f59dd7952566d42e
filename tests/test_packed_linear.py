"""Packed linear layers against the plain ones and against float64 written out."""

import copy
import gc
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.pytorch_utils import Conv1D

from rlhf_ray.config.sampling import SamplingParams
from rlhf_ray.cpu.activation import fast_activation
from rlhf_ray.cpu.packed_linear import PackedForward, pack_linears
from rlhf_ray.cpu.trained_layers import train_in_place
from rlhf_ray.generation.engine import GenerationEngine
from rlhf_ray.messages import Chunk, RolloutBatch, Sequences
from rlhf_ray.models.float_head import Float32Linear
from rlhf_ray.models.load import disable_dropout, fit_embeddings, save_model
from rlhf_ray.models.tokenizer import word_tokenizer
from rlhf_ray.rewards.scorer import RewardScorer
from rlhf_ray.roles.reference import Reference
from rlhf_ray.training.forward import LogprobModel, response_logprobs, token_batch

pytestmark = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU has no kernel for bfloat16 products"
)
VOCAB = 260
FAMILIES = {
    "gpt2": (GPT2Config, GPT2LMHeadModel, {}),
    "llama": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 2, "intermediate_size": 96}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"num_key_value_heads": 2, "intermediate_size": 96}),
}


def build(family: str = "gpt2", dtype=torch.bfloat16, **kwargs):
    torch.manual_seed(0)
    config, model, sizes = FAMILIES[family]
    shape = {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
             "max_position_embeddings": 64, "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 1}  # fmt: skip
    built = model(config(**(shape | sizes | kwargs)))
    for name, weight in built.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(weight)
    return fast_activation(built).to(dtype).eval()


def packed(layer: nn.Module) -> nn.Module:
    layer.forward = PackedForward(layer, frozen=False)
    return layer


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("rows", [(1,), (64,), (3, 5), (700,)])
def test_a_packed_layer_is_the_layer(kind, rows):
    torch.manual_seed(0)
    layer = (nn.Linear(48, 80) if kind is nn.Linear else Conv1D(80, 48)).bfloat16()
    nn.init.normal_(layer.bias)
    x = torch.randn(*rows, 48).bfloat16()
    with torch.no_grad():
        plain = layer(x)
        found = packed(layer)(x)
    weight = layer.weight.double() if kind is nn.Linear else layer.weight.double().T
    torch.testing.assert_close(found.double(), x.double() @ weight.T + layer.bias.double(), atol=1e-2, rtol=2**-8)
    torch.testing.assert_close(found, plain, atol=0, rtol=2**-7)  # at most the last bit


def test_a_layer_without_bias():
    layer = nn.Linear(16, 8, bias=False).bfloat16()
    x = torch.randn(4, 16).bfloat16()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), packed(layer)(x), atol=0, rtol=2**-7)


@torch.no_grad()
def test_a_changed_weight_is_packed_again():
    layer, x = packed(nn.Linear(16, 8, bias=False).bfloat16()), torch.eye(16).bfloat16()
    torch.testing.assert_close(layer(x), layer.weight.T)
    layer.weight.copy_(torch.randn(8, 16))
    torch.testing.assert_close(layer(x), layer.weight.T)
    layer.load_state_dict({"weight": torch.randn(8, 16)})
    torch.testing.assert_close(layer(x), layer.weight.T)
    layer.weight = nn.Parameter(torch.randn(8, 16).bfloat16())
    torch.testing.assert_close(layer(x), layer.weight.T)
    with torch.inference_mode():
        layer.weight.detach().mul_(2.0)
        torch.testing.assert_close(layer(x), layer.weight.T)


def test_with_gradients_it_is_the_plain_layer():
    layer = packed(nn.Linear(4, 2, bias=False).bfloat16())
    layer(torch.ones(3, 4).bfloat16()).sum().backward()
    assert layer.weight.grad.tolist() == [[3.0] * 4] * 2
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        assert layer.float()(torch.ones(1, 4)).dtype == torch.float32


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_feed_forward_against_its_formula(family):
    model = build(family)
    module = (model.transformer.h if family == "gpt2" else model.model.layers)[0].mlp
    x = torch.randn(2, 7, 64).bfloat16()
    pack_linears(model, dtype=torch.bfloat16)
    with torch.no_grad():
        found = module(x).double()

    def line(layer, x):
        weight = layer.weight.double().T if isinstance(layer, nn.Linear) else layer.weight.double()
        return x @ weight + (0 if layer.bias is None else layer.bias.double())

    if family == "gpt2":
        u = line(module.c_fc, x.double())
        inner = 0.5 * u * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (u + 0.044715 * u**3)))
        expected = line(module.c_proj, inner)
    else:
        gate = line(module.gate_proj, x.double())
        expected = line(module.down_proj, gate / (1 + torch.exp(-gate)) * line(module.up_proj, x.double()))
    assert (found - expected).norm() < 2**-7 * expected.norm()


def test_other_activations_and_classes_stay():
    model = build(activation_function="relu")
    block = model.transformer.h[0]
    block.attn.c_proj.__class__ = type("TheirConv1D", (Conv1D,), {})
    model.lm_head.__class__ = Float32Linear
    x = torch.randn(5, 64).bfloat16()
    with torch.no_grad():
        before = block.mlp(x)
        pack_linears(model, dtype=torch.bfloat16)
        torch.testing.assert_close(block.mlp(x), before, atol=0, rtol=2**-7)
    assert isinstance(block.attn.c_attn.forward, PackedForward)
    assert not isinstance(block.attn.c_proj.forward, PackedForward)
    assert not isinstance(model.lm_head.forward, PackedForward)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_generator_follows_its_weights(family):
    """Packed ones of an earlier version would draw other tokens."""
    params, prompts = SamplingParams(max_new_tokens=6, temperature=0.0), [[3, 4, 5], [6]]
    engine = GenerationEngine(build(family), None, eos_token_ids=[])
    engine.generate(prompts, [0, 0], params)
    torch.manual_seed(7)
    new = {name: weight + 0.3 * torch.randn_like(weight) for name, weight in build(family).state_dict().items()}
    if engine.model.config.tie_word_embeddings:
        new["lm_head.weight"] = new[next(name for name in new if "wte" in name or "embed_tokens" in name)]
    engine.load_weights(new)
    fresh = build(family)
    fresh.load_state_dict(new)
    expected = GenerationEngine(fresh, None, eos_token_ids=[]).generate(prompts, [0, 0], params)
    for found, wanted in zip(engine.generate(prompts, [0, 0], params), expected, strict=True):
        assert found.response_ids.tolist() == wanted.response_ids.tolist()
        assert found.logprobs.tolist() == wanted.logprobs.tolist()


def rollout() -> RolloutBatch:
    draws = np.random.default_rng(0)
    prompts, responses = (
        [draws.integers(2, VOCAB - 2, n).astype(np.int32) for n in lengths] for lengths in ((3, 9), (12, 5))
    )
    return RolloutBatch(
        chunk=Chunk(step=0, index=0, prompt_indices=(0, 1), sample_indices=(0, 0)), policy_version=0,
        sequences=Sequences.of(prompts, responses), rollout_logprobs=np.zeros(17, np.float32), ended=np.zeros(2, bool),
    )  # fmt: skip


def test_the_reference_computes_as_the_policy_and_holds_one_copy(tmp_path):
    """Bit for bit: at the start of a run the KL to the reference is 0, not rounding."""
    model, tokenizer = build(dtype=torch.float32, num_attention_heads=2), word_tokenizer(VOCAB)
    save_model(model, tokenizer, tmp_path / "model", "")
    batch = rollout()
    settings = {"temperature": 1.0, "compute_dtype": torch.bfloat16}
    by_torch = response_logprobs(model, batch.sequences.prompts(), batch.sequences.responses(), **settings)
    partitioned = Reference(tmp_path / "model", **settings, zero_stage=1)
    assert partitioned.logprobs(batch).values.tolist() == np.concatenate(by_torch).tolist()
    reference = Reference(tmp_path / "model", **settings)
    expected = reference.logprobs(batch).values
    np.testing.assert_allclose(expected, np.concatenate(by_torch), atol=0.05)
    policy = LogprobModel(copy.deepcopy(model), **settings).train()
    disable_dropout(policy)
    train_in_place(policy)
    tokens = token_batch(batch.sequences.prompts(), batch.sequences.responses(), packed=policy.packed)
    trained = policy(tokens)[tokens.action_mask]
    assert trained.requires_grad and trained.tolist() == expected.tolist()
    with torch.no_grad():
        assert policy(tokens)[tokens.action_mask].tolist() == expected.tolist()
    held = sum(weight.numel() for weight in reference.model.parameters())
    blocks = sum(weight.numel() for weight in model.transformer.h.parameters() if weight.ndim == 2)
    assert held == sum(weight.numel() for weight in model.parameters()) - blocks
    plain = Reference(tmp_path / "model", temperature=1.0, compute_dtype=torch.float32)
    assert all(weight.numel() for weight in plain.model.parameters())


def test_the_reward_model_scores_as_in_float32(tmp_path):
    from rlhf_ray.models.load import build_reward_model

    tokenizer = word_tokenizer(VOCAB)
    language_model = build(dtype=torch.float32)
    fit_embeddings(language_model, tokenizer)
    save_model(build_reward_model(language_model, tokenizer, 0), tokenizer, tmp_path / "model", "")
    texts = ["t4 t5 t6", "t9"], ["t7 t8", "t3 t4 t5 t6 t7"]
    exact, found = (
        RewardScorer(tmp_path / "model", compute_dtype=dtype).score(*texts, [True, False]).total
        for dtype in (torch.float32, torch.bfloat16)
    )
    np.testing.assert_allclose(found, exact, atol=0.05 * np.abs(exact).max())


def test_a_packed_reference_lets_go_of_its_file(tmp_path):
    """Pages that were read count as the process's for as long as one small weight is a view into the file."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("this system does not tell what a process has mapped")
    folder = tmp_path / "model"
    save_model(build(dtype=torch.float32), word_tokenizer(VOCAB), folder, "")
    plain = Reference(folder, temperature=1.0, compute_dtype=torch.float32)
    assert str(folder) in maps.read_text(), "weights are no views into their file any more: clone them no longer"
    del plain
    gc.collect()
    packed = Reference(folder, temperature=1.0, compute_dtype=torch.bfloat16)
    assert str(folder) not in maps.read_text()
    assert packed.model.lm_head.weight is packed.model.get_input_embeddings().weight, "tied as before"
