"""Linear layers in float32 in C, against float64 products of the same numbers, and the models that have them."""

import pytest
import torch
from crossed import crossed
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from rlhf_ray.config.sampling_params import SamplingParams
from rlhf_ray.cpu.compiled import library
from rlhf_ray.cpu.packed_linear import (
    GELU,
    SILU,
    TIMES,
    PackedForward,
    pack_linears,
    panels_of,
    product,
)
from rlhf_ray.generation.engine import GenerationEngine
from rlhf_ray.models.activation import fast_activation

pytest_plugins = ["processors"]
VOCAB = 50
in_c = pytest.mark.skipif(library() is None, reason="no C compiler")


# Rows: none left over of blocks of 6, each number that may be, and more than a piece's 96. Inputs: beyond the 256 of a pass.
# Outputs that end within a vector and within a panel.
@crossed("inputs, outputs, with_bias", [(5, 1), (64, 16), (256, 40), (700, 21), (257, 96)], [True, False])
def test_a_product(processor, threads, inputs, outputs, with_bias):
    torch.manual_seed(0)
    weight, bias = torch.randn(outputs, inputs), torch.randn(outputs) if with_bias else None
    for stored in (weight, weight.t().contiguous().t()):  # a Linear's and a Conv1D's
        panels = panels_of(stored, torch.full_like(panels_of(stored), torch.nan))
        for rows in (1, 2, 3, 4, 5, 6, 64, 203):
            x = torch.randn(rows, inputs)
            expected = x.double() @ weight.double().T + (bias.double() if with_bias else 0)
            found = product(x, panels, bias, outputs)
            torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=2e-6 * inputs**0.5)


@pytest.mark.parametrize("after", [GELU, SILU, TIMES])
def test_what_comes_after_a_product(processor, after):
    torch.manual_seed(0)
    x, weight = 3 * torch.randn(50, 300), torch.randn(37, 300) / 10
    x[0] *= 100  # where an activation is 0 or its input
    other = torch.randn(50, 37)
    u = x.double() @ weight.double().T
    expected = {
        GELU: 0.5 * u * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (u + 0.044715 * u**3))),
        SILU: u * torch.sigmoid(u),
        TIMES: u * other.double(),
    }[after]
    found = product(x, panels_of(weight), None, 37, after, other=other if after == TIMES else None)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=3e-5)


def test_a_rows_result_is_its_own_and_a_threads_number_changes_none(processor):
    """To the bit: what keeps a sample the same whatever is drawn beside it."""
    x, panels = torch.randn(203, 700), panels_of(torch.randn(40, 700))
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(product(x, panels, None, 40, GELU))
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    for rows in (slice(0, 1), slice(7, 10), slice(90, 203)):
        assert torch.equal(product(x[rows], panels, None, 40, GELU), found[0][rows])


@in_c
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_a_layer_follows_its_weight(kind):
    layer = nn.Linear(7, 5) if kind is nn.Linear else Conv1D(5, 7)
    nn.init.normal_(layer.bias)
    x, plain = torch.randn(2, 3, 7), kind.forward
    layer.forward = PackedForward(layer, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), plain(layer, x))
        where = layer.forward._packed.data_ptr()
        layer.weight.mul_(3.0)
        torch.testing.assert_close(layer(x), plain(layer, x))
        assert layer.forward._packed.data_ptr() == where  # memory that is new comes page by page
        layer.weight = nn.Parameter(torch.randn(layer.weight.shape))
        torch.testing.assert_close(layer(x), plain(layer, x))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert layer(x).dtype == torch.bfloat16
    layer(x).sum().backward()
    assert layer.weight.grad.shape == layer.weight.shape


def build(family):
    torch.manual_seed(0)
    common = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
              "max_position_embeddings": 64, "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 1}  # fmt: skip
    if family == "gpt2":
        return fast_activation(GPT2LMHeadModel(GPT2Config(**common))).eval()
    return LlamaForCausalLM(LlamaConfig(**common, intermediate_size=48)).eval()


@in_c
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_models_logits_are_those_of_its_own_layers_in_float64(family):
    model, ids = build(family), torch.randint(VOCAB, (3, 9))
    exact = build(family).double()
    pack_linears(model)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits.double(), exact(ids).logits, rtol=1e-5, atol=1e-5)
    assert isinstance(model.lm_head.forward, PackedForward) and "PackedFeedForward" in {
        type(module.forward).__name__ for module in model.modules()
    }


@in_c
def test_a_generator_draws_from_new_weights():
    params, prompts = SamplingParams(max_new_tokens=6, temperature=0.0), [[3, 4, 5], [6]]
    engine = GenerationEngine(build("gpt2"), None, eos_token_ids=[])
    assert isinstance(engine.model.lm_head.forward, PackedForward)
    engine.generate(prompts, [0, 0], params)
    torch.manual_seed(7)
    new = {name: weight + 0.3 * torch.randn_like(weight) for name, weight in build("gpt2").named_parameters()}
    engine.load_weights(new)
    plain = build("gpt2")
    plain.load_state_dict(new, strict=False)
    for prompt, found in zip(prompts, engine.generate(prompts, [0, 0], params), strict=True):
        ids = list(prompt)
        for _ in range(6):
            ids.append(int(plain(torch.tensor([ids])).logits[0, -1].argmax()))
        assert found.response_ids.tolist() == ids[len(prompt) :]
