"""Layers that add to their weights' gradients themselves, against torch's own."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from rlhf_ray.cpu import kernels
from rlhf_ray.cpu.activation import fast_activation
from rlhf_ray.cpu.norms import norms_in_c
from rlhf_ray.cpu.trained_layers import _FeedForward, train_in_place
from rlhf_ray.messages import Chunk, RolloutBatch, Sequences
from rlhf_ray.models.load import save_model
from rlhf_ray.models.tokenizer import word_tokenizer
from rlhf_ray.models.trained_part import train_only_part
from rlhf_ray.roles.reference import Reference
from rlhf_ray.training.forward import LogprobModel, token_batch

IDS = [torch.tensor([[1, 2, 1, 4]]), torch.tensor([[4, 4], [0, 6]]), torch.tensor([[2]])]


def gradients(model, passes=IDS):
    """Each parameter's gradient after a backward pass for each of `passes`, added up."""
    for number, ids in enumerate(passes, start=1):
        (model(input_ids=ids).logits.square().sum() * number).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def gpt2(**options):
    torch.manual_seed(0)
    config = GPT2Config(**{"vocab_size": 7, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 8, "resid_pdrop": 0.0,
                           "embd_pdrop": 0.0, "attn_pdrop": 0.0, "initializer_range": 0.5, **options})  # fmt: skip
    return GPT2LMHeadModel(config)


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_in_float64_are_those_of_plain_layers(tied):
    plain = gpt2(tie_word_embeddings=tied).double()
    model = copy.deepcopy(plain)
    train_in_place(model)
    found, expected = gradients(model), gradients(plain)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-12, atol=1e-12, msg=name)
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS[0]).logits, plain(input_ids=IDS[0]).logits)


@pytest.mark.parametrize("compiled", [True, False], ids=["in C", "by torch"])
@pytest.mark.parametrize("kind", ["gpt2, tied", "gpt2", "llama"])
def test_under_autocast_they_are_as_near_to_float64_as_plain_layers_are(monkeypatch, kind, compiled):
    if not compiled:
        monkeypatch.setattr(kernels, "library", lambda: None)
        monkeypatch.setattr(kernels, "has_blocks", lambda: False)
    elif kernels.library() is None:
        pytest.skip("no C compiler")
    if kind == "llama":
        torch.manual_seed(0)
        plain = LlamaForCausalLM(LlamaConfig(vocab_size=7, hidden_size=8, intermediate_size=12, num_hidden_layers=1,
                                             num_attention_heads=2, max_position_embeddings=8))  # fmt: skip
    else:
        plain = gpt2(tie_word_embeddings=kind.endswith("tied"))
    compare_with_float64(plain)


def test_so_they_are_where_products_are_in_c(processor_with_blocks):
    """Widths that these take: feed-forwards are one step, with the activation's derivative in the products."""
    plain = fast_activation(gpt2(n_embd=64, initializer_range=0.2))
    assert isinstance(compare_with_float64(plain).transformer.h[0].mlp.forward, _FeedForward)


def compare_with_float64(plain):
    """Twice over the same passes, with a step between them: the second time sums and 16-bit weights stand where they stood."""
    exact, model = copy.deepcopy(plain).double(), copy.deepcopy(plain)
    train_in_place(model)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            found, by_torch = gradients(model), gradients(plain)
        for name, expected in gradients(exact).items():
            error, usual = ((grads[name] - expected).norm() / expected.norm() for grads in (found, by_torch))
            assert error < 1.5 * usual + 2**-9, (name, float(error), float(usual))
            assert found[name].dtype == torch.float32
        for each in (exact, model, plain):
            with torch.no_grad():
                for parameter in each.parameters():
                    parameter.sub_(parameter, alpha=0.5)
            each.zero_grad()
    return model


def test_sums_and_copies_stand_where_they_stood():
    """What a step makes anew is memory from the system, page by page."""
    layer = nn.Linear(4, 3)
    train_in_place(layer)
    x, places = torch.randn(5, 4), []
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            for _ in range(2):
                layer(x).float().square().sum().backward()
        places.append((layer.weight.grad.data_ptr(), layer.bias.grad.data_ptr(), layer.forward._weight().data_ptr()))
        with torch.no_grad():
            layer.weight -= 0.1 * layer.weight.grad
        layer.zero_grad()
    assert len(set(places)) == 1


def test_a_weight_that_was_changed_or_moved_is_copied_anew():
    layer = Conv1D(3, 4)
    train_in_place(layer)
    x = torch.randn(2, 4)

    def result():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return layer(x)

    before = result()
    with torch.no_grad():
        layer.weight.mul_(2)
    assert torch.equal(result(), 2 * before)  # its bias is 0
    layer.weight.data = 2 * layer.weight.data
    assert torch.equal(result(), 4 * before)


def test_an_embeddings_gradient_by_hand_and_none_goes_through_autograd():
    layer = nn.Embedding(5, 2)
    train_in_place(layer)
    whole = []
    layer.weight.register_hook(lambda gradient: None if gradient is None else whole.append(gradient.shape))
    for ids, gradient in (
        ([1, 3, 1], [[1.0, 2.0], [3.0, 4.0], [10.0, 20.0]]),
        ([3], [[0.5, 0.25]]),
        ([0], [[7.0, 8.0]]),
    ):
        layer(torch.tensor(ids)).backward(torch.tensor(gradient))
    assert layer.weight.grad.tolist() == [[7.0, 8.0], [11.0, 22.0], [0.0, 0.0], [3.5, 4.25], [0.0, 0.0]]
    assert whole == []


def test_what_is_frozen_has_no_gradient_and_passes_on_that_by_its_input():
    """And computes as what trains does, so that a reference need not know what does."""
    plain, half, whole, x = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(4, 3), torch.randn(5, 4, requires_grad=True)
    results = []
    for layer, frozen in ((plain, ()), (half, ("weight",)), (whole, ("weight", "bias"))):
        layer.load_state_dict(plain.state_dict())
        for name in frozen:
            getattr(layer, name).requires_grad_(False)
        train_in_place(layer)
        x.grad = None
        with torch.autocast("cpu", torch.bfloat16):
            results.append(layer(x))
        results[-1].float().square().sum().backward()
        results[-1] = results[-1].detach(), x.grad
    assert all(torch.equal(one, other) for each in results[1:] for one, other in zip(each, results[0], strict=True))
    assert half.weight.grad is None and torch.equal(half.bias.grad, plain.bias.grad)
    assert whole.weight.grad is None and whole.bias.grad is None


def test_a_weight_that_lies_otherwise_and_no_lines_at_all(processor_with_blocks):
    torch.manual_seed(0)
    layer = nn.Linear(64, 32)
    layer.weight = nn.Parameter(torch.randn(64, 32).t())
    train_in_place(layer)
    x = torch.randn(7, 64)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x).float().sum().backward()
    expected = torch.ones(32, 7) @ x
    assert (layer.weight.grad - expected).norm() < 0.01 * expected.norm()
    layer = Conv1D(32, 64)
    train_in_place(layer)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x).float().sum().backward()
        layer.zero_grad()
        layer.forward.add_gradients(torch.empty(0, 64).bfloat16(), torch.empty(0, 32).bfloat16())
    assert not layer.weight.grad.any() and not layer.bias.grad.any()


def test_layers_that_do_more_or_do_not_train_stay_as_they_are():
    frozen = nn.Embedding(5, 2)
    frozen.weight.requires_grad_(False)
    for layer in (frozen, nn.Embedding(5, 2, padding_idx=0), nn.Embedding(5, 2, max_norm=1.0),
                  nn.Embedding(5, 2, scale_grad_by_freq=True), nn.Embedding(5, 2, sparse=True)):  # fmt: skip
        train_in_place(layer)
        assert "forward" not in vars(layer)


@pytest.mark.parametrize("compiled", [True, False], ids=["in C", "by torch"])
def test_a_policys_log_probs_and_gradients_in_both_ways(monkeypatch, compiled):
    """Of responses of unlike length, against float64; logits overwritten where that may be."""
    if not compiled:
        monkeypatch.setattr(kernels, "library", lambda: None)
        monkeypatch.setattr(kernels, "has_blocks", lambda: False)
    elif kernels.library() is None:
        pytest.skip("no C compiler")
    model, generator = gpt2(), np.random.default_rng(0)
    sizes = ((1, 3), (4, 2), (2, 6))
    prompts, responses = ([generator.integers(0, 7, pair[at]) for pair in sizes] for at in (0, 1))
    exact = LogprobModel(copy.deepcopy(model).double(), temperature=0.8, compute_dtype=torch.float32)
    policy = LogprobModel(model, temperature=0.8, compute_dtype=torch.bfloat16)
    train_in_place(policy)
    results = []
    for each in (exact, policy):
        batch = token_batch(prompts, responses, packed=each.packed)
        for _ in range(2):
            result = each(batch)
            (result[batch.action_mask] * torch.arange(11)).sum().backward()
        results.append(result.detach())
    torch.testing.assert_close(results[1].double(), results[0], atol=0.1, rtol=0.03)
    for (name, one), other in zip(policy.named_parameters(), exact.parameters(), strict=True):
        assert (one.grad - other.grad).norm() < 0.05 * other.grad.norm(), name


@pytest.mark.parametrize("freeze_layers", [0, 1])
def test_a_reference_computes_as_the_policy_does_where_products_are_in_c(
    tmp_path, processor_with_blocks, freeze_layers
):
    """Bit for bit, with a gradient and without: at the start of a run the KL between them is 0, not rounding."""
    model = fast_activation(gpt2(vocab_size=50, n_embd=64, n_layer=2, n_positions=32, initializer_range=0.2))
    save_model(model, word_tokenizer(50), tmp_path, "")
    draws = np.random.default_rng(0)
    prompts, responses = ([draws.integers(2, 48, n).astype(np.int32) for n in lengths] for lengths in ((3, 9), (12, 5)))
    batch = RolloutBatch(
        chunk=Chunk(step=0, index=0, prompt_indices=(0, 1), sample_indices=(0, 0)), policy_version=0,
        sequences=Sequences.of(prompts, responses), rollout_logprobs=np.zeros(17, np.float32), ended=np.zeros(2, bool),
    )  # fmt: skip
    expected = Reference(tmp_path, temperature=1.0, compute_dtype=torch.bfloat16).logprobs(batch).values.tolist()
    train_only_part(model, lora=None, freeze_layers=freeze_layers, gradient_checkpointing=False, seed=0)
    policy = LogprobModel(model.train(), temperature=1.0, compute_dtype=torch.bfloat16)
    train_in_place(policy)
    tokens = token_batch(prompts, responses, packed=policy.packed)
    trained = policy(tokens)[tokens.action_mask]
    assert trained.requires_grad and trained.tolist() == expected
    with torch.no_grad():
        assert policy(tokens)[tokens.action_mask].tolist() == expected


@pytest.mark.skipif(kernels.library() is None, reason="no C compiler")
def test_a_norm_that_is_asked_for_another_sum_than_it_holds_computes_that():
    model = gpt2()
    norms_in_c(model)
    norm, (x, other) = model.transformer.h[0].ln_1, torch.randn(2, 1, 3, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = norm(other)
        norm.forward.sum(x, torch.ones(1, 3, 8).bfloat16())
        assert torch.equal(norm(other), expected)
