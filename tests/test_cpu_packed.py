"""Packed linear layers against the plain ones and against float64 written out."""

import pytest
import torch
from crossed import crossed
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.pytorch_utils import Conv1D

from rlhf_ray.config.sampling_params import SamplingParams
from rlhf_ray.cpu.packed_linear import PackedForward, pack_linears
from rlhf_ray.generation.engine import GenerationEngine
from rlhf_ray.models.activation import fast_activation
from rlhf_ray.models.float_head import Float32Linear

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
    layer.forward = PackedForward(layer, dtype=torch.bfloat16)
    return layer


@crossed("kind, rows", [nn.Linear, Conv1D], {"1": [1], "64": [64], "3x5": [3, 5], "700": [700]})
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
    pack_linears(model)
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
        pack_linears(model)
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
