"""Log-probs and values in padded and packed batches against the Hugging Face model, one row at a time and unpadded."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from differences import saw
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from rlhf_ray.models.critic import Critic
from rlhf_ray.training.forward import LogprobModel, ValueModel, response_logprobs, token_batch
from rlhf_ray.training.padding import action_mask, pad_tokens

VOCAB, PAD = 61, 0
FAMILIES = {
    "gpt2": (GPT2Config, GPT2LMHeadModel),
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
}


@pytest.fixture(params=[False, True], ids=["padded", "packed"])
def packed(request):
    return request.param


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    config, kind = FAMILIES[request.param]
    grouped = {} if request.param == "gpt2" else {"num_key_value_heads": 2, "intermediate_size": 48}
    torch.manual_seed(0)
    # Large weights: with the usual 0.02 every position gives nearly the same log-probs, and an index off by one hides.
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "pad_token_id": PAD,
    }
    return kind(config(**sizes, **grouped)).eval()


@pytest.fixture(scope="module")
def rows():
    """(prompts, responses) of different lengths: the longest prompt has the shortest response."""
    generator = np.random.default_rng(0)
    lengths = [(1, 5), (12, 1), (4, 9), (7, 3), (2, 2)]
    prompts = [generator.integers(2, VOCAB, prompt).astype(np.int32) for prompt, _ in lengths]
    responses = [generator.integers(2, VOCAB, response).astype(np.int32) for _, response in lengths]
    return prompts, responses


def unpadded_logits(model, prompt, response, temperature):
    """float64 [T, V]: of the positions whose next token is the response's."""
    ids = torch.tensor(np.concatenate([prompt, response]), dtype=torch.int64)[None]
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0].double() / temperature
    return logits[len(prompt) - 1 : -1]


def expected_logprobs(model, prompt, response, temperature=1.0):
    """(log-prob, entropy) of each response token, in float64 from the softmax itself."""
    probs = unpadded_logits(model, prompt, response, temperature).softmax(-1)
    logprobs = [float(probs[t, token].log()) for t, token in enumerate(response)]
    return np.array(logprobs), -(probs * probs.log()).sum(-1).numpy()


def logprob_module(model, temperature=1.0, compute_dtype=torch.float32):
    return LogprobModel(model, temperature=temperature, compute_dtype=compute_dtype)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_and_entropy_are_those_of_each_row_alone(model, rows, temperature, packed):
    prompts, responses = rows
    batch = token_batch(prompts, responses, packed=packed)
    module = logprob_module(model, temperature)
    assert module.packed
    with torch.no_grad():
        logprobs, entropies = module(batch, with_entropy=True)
        assert torch.equal(logprobs, module(batch))
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        expected, expected_entropy = expected_logprobs(model, prompt, response, temperature)
        length = len(response)
        np.testing.assert_allclose(logprobs[row, :length], expected, atol=1e-5, rtol=0)
        np.testing.assert_allclose(entropies[row, :length], expected_entropy, atol=1e-5, rtol=0)
        assert (logprobs[row, length:] == 0).all() and (entropies[row, length:] == 0).all()


@pytest.mark.parametrize("microbatch_size", [1, 2, 32])
def test_response_logprobs_in_any_split(model, rows, microbatch_size):
    prompts, responses = rows
    found = response_logprobs(model, prompts, responses, temperature=0.8, microbatch_size=microbatch_size)
    for prompt, response, logprobs in zip(prompts, responses, found, strict=True):
        assert logprobs.dtype == np.float32
        expected = expected_logprobs(model, prompt, response, 0.8)[0]
        assert saw("log-probs: any split, against each row alone", np.abs(logprobs - expected).max()) < 1e-5


def test_junk_in_the_padding_changes_nothing(model, rows):
    prompts, responses = rows
    batch = token_batch(prompts, responses, packed=False)
    input_ids = batch.inputs["input_ids"]
    junk = torch.randint(2, VOCAB, input_ids.shape, generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([len(p) + len(r) for p, r in zip(prompts, responses, strict=True)])
    spoilt = torch.where(torch.arange(input_ids.shape[1]) >= lengths[:, None], junk, input_ids)
    assert not torch.equal(spoilt, input_ids)
    for module in (logprob_module(model), value_module(model)):
        with torch.no_grad():
            clean = module(batch)
            found = module(replace(batch, inputs={"input_ids": spoilt}))
            assert saw("log-probs, values: junk in the padding", (found - clean).abs().max()) == 0.0


def test_the_gradient_is_that_of_each_row_alone(model, rows, packed):
    """Of all weights, by log-probs and entropy; the rows alone go through the model as Hugging Face wrote it."""
    prompts, responses = rows
    module = logprob_module(model)
    module.entropy_gradient = True
    model.zero_grad()
    logprobs, entropies = module(token_batch(prompts, responses, packed=packed), with_entropy=True)
    (logprobs.sum() + 0.5 * entropies.sum()).backward()
    together = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    model.set_attn_implementation("eager")
    for prompt, response in zip(prompts, responses, strict=True):
        ids = torch.tensor(np.concatenate([prompt, response]), dtype=torch.int64)[None]
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        chosen = logits[torch.arange(len(response)), torch.from_numpy(response.astype(np.int64))]
        (chosen.sum() - 0.5 * (logits.exp() * logits).sum()).backward()
    for name, weight in model.named_parameters():
        largest = float(weight.grad.abs().max())
        gap = float((together[name] - weight.grad).abs().max())
        assert saw("gradient: padded and packed rows, against each row alone", gap / max(largest, 1.0)) < 1e-4, name
    assert largest > 0.1


def value_module(model):
    critic = Critic(model.base_model)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        critic.value_head.weight.copy_(torch.randn(critic.value_head.weight.shape, generator=generator))
        critic.value_head.bias.fill_(0.5)
    return ValueModel(critic, compute_dtype=torch.float32)


def test_values_are_of_the_state_before_each_response_token(model, rows, packed):
    """The first value reads the prompt alone; the last does not see the last token."""
    prompts, responses = rows
    module = value_module(model)
    head = module.model.value_head
    with torch.no_grad():
        values = module(token_batch(prompts, responses, packed=packed))
        for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            for t in range(len(response)):
                seen = torch.tensor(np.concatenate([prompt, response[:t]]), dtype=torch.int64)[None]
                hidden = model.base_model(input_ids=seen, use_cache=False).last_hidden_state[0, -1]
                expected = float(hidden.double() @ head.weight[0].double() + head.bias[0].double())
                assert float(values[row, t]) == pytest.approx(expected, abs=2e-5)
            assert (values[row, len(response) :] == 0).all()


def test_bfloat16_is_autocast_and_close(model, rows, packed):
    prompts, responses = rows
    batch = token_batch(prompts, responses, packed=packed)
    with torch.no_grad():
        exact = logprob_module(model)(batch)
        rough = logprob_module(model, compute_dtype=torch.bfloat16)(batch)
    assert rough.dtype == torch.float32
    assert 0 < float((rough - exact).abs().max()) < 0.2
    assert next(model.parameters()).dtype == torch.float32


def test_a_batch_the_mask_and_padded_tokens_by_hand():
    prompts, responses = [np.array([5]), np.array([6, 7, 8])], [np.array([1, 2]), np.array([3])]
    padded, packed = (token_batch(prompts, responses, packed=packed) for packed in (False, True))
    assert padded.inputs["input_ids"].tolist() == [[5, 1, 2, 0], [6, 7, 8, 3]]
    assert packed.inputs["input_ids"].tolist() == [[5, 1, 2, 6, 7, 8, 3]]
    assert packed.inputs["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3]]
    assert padded.states.tolist() == [0, 1, 6] and packed.states.tolist() == [0, 1, 5]  # of tokens 5, 1 and 8
    for batch in (padded, packed):
        assert batch.targets.tolist() == [1, 2, 3]
        assert batch.action_mask.tolist() == [[True, True], [True, False]]
        assert batch.in_rows(torch.tensor([0.5, -1, 2])).tolist() == [[0.5, -1], [2, 0]]
    assert action_mask(torch.tensor([2, 1])).tolist() == [[True, True], [True, False]]
    rows = pad_tokens([np.array([0.5, -1], np.float32), np.array([2], np.float32)])
    assert rows.tolist() == [[0.5, -1], [2, 0]] and rows.dtype == torch.float32


def tokens_of_the_last_feed_forward(model, run):
    """How many tokens the feed-forward layers of the last block and of the one before it saw, and what `run` gave."""
    seen = {}
    config = model.config.get_text_config()
    blocks = next(
        m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == config.num_hidden_layers
    )
    norms = [getattr(block, "ln_2", None) or block.post_attention_layernorm for block in blocks[-2:]]
    inner = [next(m for m in block.mlp.modules() if not list(m.children())) for block in blocks[-2:]]
    hooks = [
        module.register_forward_pre_hook(
            lambda module, inputs, key=key: seen.__setitem__(key, inputs[0].shape[:-1].numel())
        )
        for key, module in zip(("norm before", "norm last", "before", "last"), [*norms, *inner], strict=True)
    ]
    try:
        result = run()
    finally:
        for hook in hooks:
            hook.remove()
    assert seen["norm before"] == seen["norm last"] == seen["before"]
    return seen["before"], seen["last"], result


@pytest.mark.parametrize("of_policy", [True, False], ids=["policy", "critic"])
def test_the_last_feed_forward_runs_where_it_is_read(model, rows, packed, of_policy):
    """At the 20 states before a response token, of 46 tokens (60 with padding); twice, and then the model is as it was."""
    module = logprob_module(model) if of_policy else value_module(model)
    batch = token_batch(*rows, packed=packed)
    for _ in range(2):
        everywhere, read, result = tokens_of_the_last_feed_forward(model, lambda: module(batch))
        assert (everywhere, read) == (46 if packed else 65, 20)
        result.sum().backward()
    ids = torch.ones(1, 7, dtype=torch.long)
    assert tokens_of_the_last_feed_forward(model, lambda: model(ids, use_cache=False))[:2] == (7, 7)


def test_what_a_backward_pass_computes_again_is_computed_everywhere(rows):
    """The second forward pass of checkpointing comes when nobody says any more which tokens are read."""
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    model = LlamaForCausalLM(config).train()
    model.gradient_checkpointing_enable()
    everywhere, read, _ = tokens_of_the_last_feed_forward(
        model, lambda: logprob_module(model)(token_batch(*rows, packed=True))
    )
    assert everywhere == read == 46
