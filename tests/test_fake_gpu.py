"""Forward passes of all roles where every mix of devices raises. Shapes and devices are real, numbers are not."""

import numpy as np
import pytest
import torch
from fake_gpu import fake_gpu, moved
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
)

from rlhf_ray.config import LoraConfig
from rlhf_ray.config.sampling_params import SamplingParams, TokenRules
from rlhf_ray.generation import graph_step, ragged_decoder
from rlhf_ray.generation.engine import GenerationEngine
from rlhf_ray.messages import Support
from rlhf_ray.models.critic import critic_from_reward_model
from rlhf_ray.models.float_head import score_in_float32
from rlhf_ray.models.frozen import hold_frozen
from rlhf_ray.models.last_block import last_feed_forward
from rlhf_ray.models.load import disable_dropout, fast_attention
from rlhf_ray.models.trained_part import adapter_off, train_only_part
from rlhf_ray.models.wire import pack_weights
from rlhf_ray.training.classifier import line_logits, pack_classifier
from rlhf_ray.training.forward import LogprobModel, ValueModel, module_logprobs, token_batch

pytestmark = pytest.mark.fakegpu

SIZES = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 512,
         "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}  # fmt: skip
GROUPED = {"num_key_value_heads": 2, "intermediate_size": 24}
FAMILIES = {
    "gpt2": (lambda: GPT2Config(**SIZES), GPT2LMHeadModel, GPT2ForSequenceClassification),
    "llama": (lambda: LlamaConfig(**SIZES, **GROUPED), LlamaForCausalLM, LlamaForSequenceClassification),
    "qwen2": (lambda: Qwen2Config(**SIZES, **GROUPED), Qwen2ForCausalLM, Qwen2ForSequenceClassification),
}
GENERATOR = np.random.default_rng(0)
PROMPTS = [GENERATOR.integers(3, 61, length).astype(np.int32) for length in (1, 5, 300)]
RESPONSES = [GENERATOR.integers(3, 61, length).astype(np.int32) for length in (5, 2, 3)]
SUPPORTS = [
    Support.of([np.array([token, 60]) for token in response], np.zeros(len(response), np.float32)) for response in RESPONSES
]


class Letters:
    eos_token_id = 1

    def decode(self, ids, **_):
        return "a" * len(ids)


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def causal_lm(family):
    config, kind, _ = FAMILIES[family]
    model = kind(config()).eval()
    disable_dropout(model)
    return model


def reward_model(family):
    config, _, kind = FAMILIES[family]
    model = kind(type(config()).from_dict(config().to_dict() | {"num_labels": 1})).eval()
    disable_dropout(model)
    return model


def test_a_mix_of_devices_raises():
    with fake_gpu():
        there, here = torch.ones(2, 3, device="cuda"), torch.ones(2, 3)
        assert (there @ there.T).device.type == "cuda" and float(there.sum()) and there.cpu().numpy().shape == (2, 3)
        for mix in (lambda: there + here, lambda: torch.cat([there, here]), lambda: there.numpy()):
            with pytest.raises((RuntimeError, TypeError), match=r"device|cuda"):
                mix()


@pytest.mark.parametrize("engine", ["torch", "graphs"])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_new_tokens=4),
        SamplingParams(max_new_tokens=4, top_k=5, temperature=0.7),
        SamplingParams(max_new_tokens=3, temperature=0.0),
    ],
    ids=["all", "top_k", "greedy"],
)
def test_generation(family, engine, params, monkeypatch):
    monkeypatch.setattr(graph_step, "captured", lambda run, device: run)
    monkeypatch.setattr(ragged_decoder, "PREFILL_TOKENS", 600)  # in two parts
    model = causal_lm(family)
    with fake_gpu():
        options = {"graphs": engine == "graphs", "max_cache_tokens": 10_000}
        drawing = GenerationEngine(moved(model, torch.bfloat16), Letters(), eos_token_ids=[1], **options)
        assert [len(one.response_ids) for one in drawing.generate(PROMPTS, [1, 2, 3], params)] == [params.max_new_tokens] * 3
        rules = TokenRules(logit_bias=((4, 1.0),), min_tokens=1, alternatives=2)
        for number, prompt in enumerate(PROMPTS):  # rows with parameters and rules of their own
            its = SamplingParams(max_new_tokens=2 + number, top_p=0.9, temperature=0.5 + number)
            drawing.submit(prompt, number, its, rules if number else None)
        while drawing.num_running or drawing.num_waiting:
            drawing.step()


@pytest.mark.parametrize("supports", [None, SUPPORTS], ids=["all", "truncated"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_reference(family, packed, supports):
    model = fast_attention(causal_lm(family), "cuda")
    module = LogprobModel(model.requires_grad_(False), temperature=0.7, compute_dtype=torch.bfloat16)
    module.packed = module.packed and packed
    hold_frozen(module, torch.bfloat16)
    with fake_gpu():
        assert [len(row) for row in module_logprobs(moved(module), PROMPTS, RESPONSES, supports, microbatch_size=2)] == [5, 2, 3]


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)], ids=["whole", "lora"])
def test_policy_and_critic(family, lora):
    model = train_only_part(causal_lm(family), lora=lora, freeze_layers=0, gradient_checkpointing=False, seed=0)
    policy = LogprobModel(fast_attention(model, "cuda"), temperature=1.0, compute_dtype=torch.bfloat16)
    hold_frozen(policy, torch.bfloat16)
    critic = ValueModel(critic_from_reward_model(reward_model(family)), compute_dtype=torch.bfloat16)
    with fake_gpu():
        batch = token_batch(PROMPTS, RESPONSES, SUPPORTS, packed=True, device="cuda")
        logprobs, entropies = moved(policy)(batch, with_entropy=True)
        assert logprobs.device.type == entropies.device.type == "cuda" and logprobs.dtype == torch.float32
        policy.entropy_gradient = True
        with torch.enable_grad():  # from the states, in pieces
            logprobs, entropies = policy(batch, with_entropy=True)
        assert logprobs.shape == entropies.shape == (3, 5) and logprobs.requires_grad and entropies.requires_grad
        if lora is not None:
            with adapter_off(policy):
                policy(batch)
        assert moved(critic)(batch).shape == (3, 5)


def test_reward(family):
    model = score_in_float32(reward_model(family).requires_grad_(False))
    assert pack_classifier(model)
    hold_frozen(model, torch.bfloat16)
    with fake_gpu():
        with torch.autocast("cuda", torch.bfloat16):
            scores = line_logits(moved(model), PROMPTS, torch.tensor([0, 5, 305], device="cuda"), last_feed_forward(model))
        assert scores.shape == (3, 1) and scores.dtype == torch.float32 and scores.device.type == "cuda"


class Copies(TorchDispatchMode):
    """Of each copy or cast: devices and dtypes on both sides."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = args[0] if func is torch.ops.aten._to_copy.default else args[1]
            self.made.append((source.device.type, source.dtype, result.device.type, result.dtype))
        return result


def test_weights_are_cast_where_they_are():
    """Two bytes of each weight cross the bus, not four."""
    with fake_gpu():
        weight = torch.empty(6, 4, device="cuda").t()
        with Copies() as copies:
            (packed,) = pack_weights([("a", weight)], 1, torch.bfloat16)
    assert packed["a"].shape == (4, 6) and packed["a"].dtype == np.int16
    crossing = [(before, after) for there, before, here, after in copies.made if there == "cuda" and here == "cpu"]
    assert crossing == [(torch.bfloat16, torch.bfloat16)]
