"""Log-probs and entropy from the states below the output layer: against float64 by torch's own operations, and in little memory."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from rlhf_ray.algorithms import chunked_head
from rlhf_ray.algorithms.chunked_head import head_logprobs_and_entropy
from rlhf_ray.algorithms.logprobs import selected_logprobs_and_entropy
from rlhf_ray.messages import Support
from rlhf_ray.training.forward import LogprobModel, token_batch


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Rows 0 to 6, 7 to 13, ...: the last piece of 23 rows has two."""
    monkeypatch.setattr(chunked_head, "rows_at_a_time", lambda device, width: 7)
    monkeypatch.setattr(chunked_head, "MANY_ROWS", 1)


def plain(states, weight, ids, temperature, support):
    """By torch's own softmax of all logits, in float64."""
    logits = states @ weight.T / temperature
    logits = logits if support is None else torch.where(support, logits, -torch.inf)
    logprobs = logits.log_softmax(-1)
    selected = logprobs.gather(1, ids[:, None]).squeeze(1)
    return selected, -(logprobs.exp() * torch.where(logprobs == -torch.inf, 0.0, logprobs)).sum(-1)


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize(
    "dtype, compute_dtype, near",
    [(torch.float64, torch.float64, 1e-12), (torch.float32, torch.float32, 3e-6), (torch.float32, torch.bfloat16, 0.06)],
)
def test_values_and_gradients(dtype, compute_dtype, near, cut):
    generator = torch.Generator().manual_seed(0)
    states, weight = (torch.randn(rows, 8, generator=generator).to(dtype).requires_grad_() for rows in (23, 31))
    ids = torch.randint(31, (23,), generator=generator)
    among = torch.rand(23, 31, generator=generator) < 0.4 if cut else None
    if among is not None:
        among.scatter_(1, ids[:, None], True)
    slopes = torch.randn(2, 23, generator=generator, dtype=torch.float64)
    support = None if among is None else among.nonzero(as_tuple=True)
    found = head_logprobs_and_entropy(states, weight, ids, temperature=0.7, compute_dtype=compute_dtype, support=support)
    mine = torch.autograd.grad(
        sum((one.double() * slope).sum() for one, slope in zip(found, slopes, strict=True)), (states, weight)
    )
    exact = [each.detach().double().requires_grad_() for each in (states, weight)]
    wanted = plain(*exact, ids, 0.7, among)
    theirs = torch.autograd.grad(sum((one * slope).sum() for one, slope in zip(wanted, slopes, strict=True)), exact)
    for one, other in zip((*found, *mine), (*wanted, *theirs), strict=True):
        torch.testing.assert_close(one.double(), other, atol=near, rtol=near)
    assert [each.dtype for each in mine] == [dtype, dtype]


def test_a_frozen_output_layer_has_no_gradient():
    states, weight = torch.randn(9, 4, requires_grad=True), torch.randn(5, 4)
    ids = torch.zeros(9, dtype=torch.int64)
    both = head_logprobs_and_entropy(states, weight, ids, temperature=1.0, compute_dtype=torch.float32)
    (both[0].sum() + both[1].sum()).backward()
    assert states.grad is not None and weight.grad is None


@pytest.mark.parametrize("dtype, near", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_the_entropys_gradient_by_logits_that_are_there(dtype, near):
    generator = torch.Generator().manual_seed(0)
    logits = (2 * torch.randn(40, 300, generator=generator)).to(dtype).requires_grad_()
    ids = torch.randint(300, (40,), generator=generator)
    entropy = selected_logprobs_and_entropy(logits, ids, temperature=0.7, entropy_gradient=True)[1]
    slopes = torch.randn(40, generator=generator)
    (found,) = torch.autograd.grad((entropy * slopes).sum(), logits)
    exact = logits.detach().double().requires_grad_()
    logprobs = (exact / 0.7).log_softmax(-1)
    (expected,) = torch.autograd.grad((-(logprobs.exp() * logprobs).sum(-1) * slopes).sum(), exact)
    torch.testing.assert_close(found.double(), expected, atol=near, rtol=0)


class LargestTensor(TorchDispatchMode):
    """Notes the numbers in the largest tensor that any operation makes."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for one in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(one, torch.Tensor):
                self.numbers = max(self.numbers, one.untyped_storage().nbytes() // one.itemsize)
        return made


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("kind, config", [(GPT2LMHeadModel, GPT2Config), (LlamaForCausalLM, LlamaConfig)])
def test_an_update_with_an_entropy_bonus_never_has_all_logits(kind, config, cut):
    """300 tokens of 401 entries, in pieces of 8 (the model's width) or fewer: far below 120,300 numbers."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 401, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "initializer_range": 0.2}
    model = kind(config(**sizes, **({"intermediate_size": 16} if kind is LlamaForCausalLM else {}))).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    generator = np.random.default_rng(0)
    prompts = [generator.integers(0, 401, 3) for _ in range(10)]
    responses = [generator.integers(0, 401, 30) for _ in range(10)]
    kept = [[np.unique([token, *generator.integers(0, 401, 5)]) for token in response] for response in responses]
    supports = [Support.of(each, np.zeros(len(each), np.float32)) for each in kept] if cut else None
    module = LogprobModel(model, temperature=0.9, compute_dtype=torch.float32, entropy_gradient=True)
    batch = token_batch(prompts, responses, supports, packed=module.packed)
    with LargestTensor() as largest:
        logprobs, entropies = module(batch, with_entropy=True)
        (logprobs.sum() + 0.3 * entropies.sum()).backward()  # a tied output layer's gradient meets that of the embeddings
    assert largest.numbers < 300 * 401 / 4
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    logits = model(**batch.inputs, use_cache=False).logits.squeeze(0)[batch.states].double()
    selected, entropy = plain(logits, torch.eye(401, dtype=torch.float64), batch.targets, 0.9, batch.support_mask(logits))
    torch.testing.assert_close(logprobs.double(), batch.in_rows(selected), atol=1e-5, rtol=0)
    torch.testing.assert_close(entropies.double(), batch.in_rows(entropy), atol=1e-5, rtol=0)
    (selected.sum() + 0.3 * entropy.sum()).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=2e-4, rtol=1e-3, msg=name)
