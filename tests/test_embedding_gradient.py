"""Embeddings that add to their weights' gradients themselves, against torch's own."""

import copy

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from rlhf_ray.training.embedding_gradient import add_to_looked_up_rows

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
    add_to_looked_up_rows(model)
    found, expected = gradients(model), gradients(plain)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-12, atol=1e-12, msg=name)
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS[0]).logits, plain(input_ids=IDS[0]).logits)


def test_an_embeddings_gradient_by_hand_and_none_goes_through_autograd():
    layer = nn.Embedding(5, 2)
    add_to_looked_up_rows(layer)
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


def test_the_sum_stands_where_it_stood():
    """What a step makes anew is memory from the system, page by page."""
    layer, places = nn.Embedding(5, 2), []
    add_to_looked_up_rows(layer)
    for _ in range(3):
        for _ in range(2):
            layer(torch.tensor([1, 3])).square().sum().backward()
        places.append(layer.weight.grad.data_ptr())
        layer.zero_grad()
    assert len(set(places)) == 1


def test_layers_that_do_more_or_do_not_train_stay_as_they_are():
    frozen = nn.Embedding(5, 2)
    frozen.weight.requires_grad_(False)
    for layer in (frozen, nn.Embedding(5, 2, padding_idx=0), nn.Embedding(5, 2, max_norm=1.0),
                  nn.Embedding(5, 2, scale_grad_by_freq=True), nn.Embedding(5, 2, sparse=True)):  # fmt: skip
        add_to_looked_up_rows(layer)
        assert "forward" not in vars(layer)
