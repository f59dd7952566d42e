"""Packed lines: their layout by hand, which models read them, and the token budget that cuts a batch."""

import numpy as np
import pytest
import torch
from crossed import crossed
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from rlhf_ray.algorithms.schedule import cut_microbatches, deal_rows
from rlhf_ray.training import packed_attention, packing
from rlhf_ray.training.forward import response_logprobs
from rlhf_ray.training.packing import PACKED, Layout, pack

VOCAB = 37
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
}
GATED = {"intermediate_size": 48, "num_key_value_heads": 2}


def test_a_layout_by_hand():
    """Lengths 3, 1, 2: tokens 0-2, 3, 4-5 on the line; rows of three slots, padding repeats the last token."""
    layout = Layout.of(np.array([3, 1, 2]))
    assert (layout.rows, layout.longest) == (3, 3)
    assert layout.spread.tolist() == [0, 1, 2, 3, 3, 3, 4, 5, 5]
    assert layout.gather.tolist() == [0, 1, 2, 3, 6, 7]
    even = Layout.of(np.array([2, 2]))
    assert (even.rows, even.longest, even.spread, even.gather) == (2, 2, None, None)


def rows_of(lengths):
    generator = np.random.default_rng(0)
    return [generator.integers(0, VOCAB, length) for length in lengths]


def alone(model, prompt, response):
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(np.concatenate([prompt, response]))[None], use_cache=False).logits[0]
    logprobs = logits.double().log_softmax(-1)[len(prompt) - 1 : -1]
    return logprobs[torch.arange(len(response)), torch.from_numpy(response)].numpy()


@pytest.mark.parametrize("kind, config, packs", [
    (GPTNeoXForCausalLM, GPTNeoXConfig(**SIZES, intermediate_size=48), True),  # not tested elsewhere: compared when built
    (MistralForCausalLM, MistralConfig(**SIZES, **GATED, sliding_window=None), True),
    (MistralForCausalLM, MistralConfig(**SIZES, **GATED, sliding_window=4), False),
    (BloomForCausalLM, BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.2), False),
], ids=["gpt_neox", "mistral", "sliding_window", "alibi"])  # fmt: skip
def test_a_model_that_cannot_read_lines_gets_padded_rows(kind, config, packs):
    torch.manual_seed(0)
    model = kind(config).eval()
    prompts, responses = rows_of([3, 6, 1]), rows_of([4, 1, 8])
    expected = [alone(model, *row) for row in zip(prompts, responses, strict=True)]
    found = response_logprobs(model, prompts, responses)
    assert (model.config._attn_implementation == PACKED) == packs
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


def test_a_model_whose_layers_do_something_else_is_found_out(monkeypatch):
    """A family that nobody tested, whose attention forgets the layout."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_positions=32, n_embd=32, n_layer=1, n_head=2)).eval()
    monkeypatch.setattr(packing, "is_tested", lambda model_type: False)
    assert pack(model)
    model.set_attn_implementation("eager")
    for block in model.transformer.h:
        forward = block.attn.forward
        block.attn.forward = lambda *args, packed=None, forward=forward, **kwargs: forward(*args, **kwargs)
    assert not pack(model) and model.config._attn_implementation == "eager"


@crossed("plain_length, kv_heads", [0, 256], [1, 2, 4])
def test_both_kinds_of_attention_are_the_models_own(monkeypatch, plain_length, kv_heads):
    """With grouped keys and values too; outputs and gradients."""
    monkeypatch.setattr(packed_attention, "PLAIN_LENGTH", plain_length)
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES | {"intermediate_size": 48, "num_key_value_heads": kv_heads})
    model = LlamaForCausalLM(config).eval()
    rows = [torch.from_numpy(row) for row in rows_of([5, 1, 9])]
    model.set_attn_implementation("eager")
    expected = torch.cat([model(input_ids=row[None]).logits[0] for row in rows])
    (weight,) = [w for name, w in model.named_parameters() if name.endswith("layers.0.self_attn.k_proj.weight")]
    (expected_gradient,) = torch.autograd.grad((expected**2).sum(), weight)
    assert pack(model)
    line = packing.line_inputs([row.numpy() for row in rows], Layout.of(np.array([5, 1, 9])))
    found = model(**line, use_cache=False).logits[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    (gradient,) = torch.autograd.grad((found**2).sum(), weight)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("columns", [5, 64, 80])
def test_attention_weights_of_16_bits_are_those_of_float64_rounded(columns):
    torch.manual_seed(columns)
    hidden = torch.full((columns, columns), -torch.inf).triu(1)
    scores = (3 * torch.randn(4, columns, columns) + hidden).bfloat16().requires_grad_()
    exact = scores.detach().double().requires_grad_()
    weights, expected = packed_attention.softmax(scores), torch.exp(exact - exact.logsumexp(-1, keepdim=True))
    assert weights.dtype == torch.bfloat16
    torch.testing.assert_close(weights.double(), expected, atol=1e-7, rtol=2**-8)
    upstream = torch.randn(4, columns, columns).bfloat16()
    weights.backward(upstream)
    expected.backward(upstream.double())
    torch.testing.assert_close(scores.grad.double(), exact.grad, atol=5e-3, rtol=2**-6)


def test_a_packed_model_stays_right_for_other_callers():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_positions=32, n_embd=32, n_layer=1, n_head=2)).eval()
    ids, mask = torch.from_numpy(np.stack(rows_of([6, 6]))), torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    before = model(input_ids=ids, attention_mask=mask).logits
    assert pack(model)
    after = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(after[mask.bool()], before[mask.bool()], atol=1e-5, rtol=0)


# -- cutting a batch --------------------------------------------------------------------------------------------------


def test_microbatches_by_hand():
    lengths = [5, 9, 2, 7, 3]
    assert cut_microbatches(lengths, size=2) == [[0, 1], [2, 3], [4]]
    assert cut_microbatches(lengths, size=2, tokens=12) == [[1], [3, 0], [4, 2]]  # 9; 7 + 5; 3 + 2
    assert cut_microbatches(lengths, size=2, tokens=12, at_least=5) == [[1], [3], [0], [4], [2]]
    assert cut_microbatches([4, 30], size=1, tokens=10) == [[1], [0]]  # too long for the budget: alone


def test_rows_are_dealt_there_and_back_by_hand():
    """Lengths 9 7 5 3 2 1 go to ranks 0 1 1 0 0 1: 14 and 13 tokens."""
    assert deal_rows([0, 1, 2, 3, 4, 5], [2, 9, 3, 1, 7, 5], 2) == [[0, 1, 2], [3, 4, 5]]
    assert deal_rows([4, 2, 0], [1] * 5, 1) == [[0, 2, 4]]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(40, 90), st.integers(1, 4), st.data())
def test_every_row_has_one_microbatch_within_the_budget(lengths, tokens, ranks, data):
    at_least = data.draw(st.integers(1, len(lengths)))
    groups = cut_microbatches(lengths, size=1, tokens=tokens, at_least=at_least)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    assert all(group and sum(lengths[row] for row in group) <= tokens for group in groups)
    assert len(groups) >= at_least
    rows = list(range(len(lengths) // ranks * ranks))
    dealt = deal_rows(rows, lengths, ranks)
    assert sorted(row for part in dealt for row in part) == rows
    assert {len(part) for part in dealt} == {len(rows) // ranks}
    loads = [sum(lengths[row] for row in part) for part in dealt]
    assert max(loads) - min(loads) <= max(lengths)
