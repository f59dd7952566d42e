"""Weights held (frozen) or gathered (ZeRO-3) in the dtype that they are multiplied in: half the bytes, the same bits."""

from collections import Counter
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from deepspeed.runtime.zero import partition_parameters
from ranks import clones, on_ranks
from tiny import tiny_recipe, write_start
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from rlhf_ray.config import LoraConfig
from rlhf_ray.models.critic import build_critic
from rlhf_ray.models.frozen import hold_frozen
from rlhf_ray.models.load import load_causal_lm
from rlhf_ray.models.trained_part import train_only_part
from rlhf_ray.rewards.scorer import RewardScorer
from rlhf_ray.roles.reference_policy import Reference
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.training.deepspeed_engine import DeepSpeedEngine, OptimiserConfig
from rlhf_ray.training.forward import LogprobModel, module_logprobs, response_logprobs, token_batch

BF16, LORA = torch.bfloat16, LoraConfig(rank=3, alpha=6.0)
SIZES = {"vocab_size": 31, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 16,
         "initializer_range": 0.4}  # fmt: skip
ROWS = torch.randint(0, 31, (4, 9), generator=torch.Generator().manual_seed(3))
PROMPTS, RESPONSES = [row[:4].numpy() for row in ROWS], [row[4:].numpy() for row in ROWS]


def make_model(family):
    torch.manual_seed(0)
    if family == "gpt2":  # its output layer is tied to the embeddings
        return GPT2LMHeadModel(GPT2Config(**SIZES, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    return LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=17))


def with_adapters(family):
    """Adapters that are not at their start, B = 0."""
    model = train_only_part(make_model(family), lora=LORA, freeze_layers=0, gradient_checkpointing=False, seed=5)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return LogprobModel(model, temperature=1.0, compute_dtype=BF16)


def held(module):
    return {name for name, parameter in module.named_parameters() if parameter.dtype == BF16}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_log_probs_and_gradients_keep_every_bit(family):
    results = []
    for hold in (False, True):
        module = with_adapters(family)
        if hold:
            hold_frozen(module, BF16)
        output = module(token_batch(PROMPTS, RESPONSES, packed=True))
        output.sum().backward()
        results.append([output, *(p.grad for p in module.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1]) > 8
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    names = held(module)
    assert len(names) == {"gpt2": 2 * 4, "llama": 2 * 7 + 1}[family]  # Llama's output layer, too: it is not tied
    assert all(name.endswith("weight") and "norm" not in name and "wte" not in name and "lora" not in name for name in names)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_start(tiny_recipe(), RunFolder(tmp_path_factory.mktemp("run")))


def test_reference_and_reward_model_are_held_so(run):
    start = run.stage("sft").model
    model = Reference(start, temperature=1.0, compute_dtype=BF16)
    assert len(held(model.module)) == 2 * 4  # GPT-2's four matrices of each block
    rows = module_logprobs(model.module, PROMPTS, RESPONSES, microbatch_size=32)
    wanted = response_logprobs(load_causal_lm(start), PROMPTS, RESPONSES, compute_dtype=BF16)
    assert all(np.array_equal(one, other) for one, other in zip(rows, wanted, strict=True))
    assert not held(Reference(start, temperature=1.0, compute_dtype=torch.float32).module)

    texts = ["one", "two more"], [" yes", " no and no"], [True, True]
    scorer = RewardScorer(run.stage("reward").model, compute_dtype=BF16)
    assert len(held(scorer.model)) == 2 * 4 and scorer.model.score.weight.dtype == torch.float32
    whole = RewardScorer(run.stage("reward").model, compute_dtype=torch.float32)
    assert not held(whole.model)
    whole.compute_dtype = BF16
    assert np.array_equal(scorer.score(*texts).total, whole.score(*texts).total)


def test_float32_holds_nothing():
    module = make_model("llama").requires_grad_(False)
    hold_frozen(module, torch.float32)
    assert not held(module)


# -- under DeepSpeed --------------------------------------------------------------------------------------------------


def loss_of(output, _):
    return (output.exp() * torch.arange(output.shape[1])).sum() / len(ROWS)


@contextmanager
def watched_gathers():
    """{dtype: numbers that this rank has sent}"""
    seen, plain = Counter(), partition_parameters._dist_allgather_fn

    def gather(given, *rest):
        seen[given.dtype] += given.numel()
        return plain(given, *rest)

    partition_parameters._dist_allgather_fn = gather
    try:
        yield seen
    finally:
        partition_parameters._dist_allgather_fn = plain


def work(rank, world, folder):
    """{(stage, whether frozen weights are held in bfloat16): the trained weights after two steps}, and what ZeRO-3 starts from."""
    results = {}
    batch = token_batch(PROMPTS[2 * rank : 2 * rank + 2], RESPONSES[2 * rank : 2 * rank + 2], packed=True)
    for stage in (0, 1, 2, 3):
        for hold in (False, True):
            module = with_adapters("llama")
            if hold:
                hold_frozen(module, BF16)
            settings = OptimiserConfig(adam_eps=1e-5, max_grad_norm=0.1, zero_stage=stage)
            engine = DeepSpeedEngine(module, settings, device=torch.device("cpu"))
            for rate in (0.01, 0.02):
                engine.step([((batch,), None)], loss_of, learning_rate=rate)
            results[stage, hold] = clones(engine.weights()), len(held(engine.module))
    for gathered_as in (torch.float32, BF16):
        settings = OptimiserConfig(adam_eps=1e-5, max_grad_norm=0.1, zero_stage=3, compute_dtype=gathered_as)
        module = LogprobModel(make_model("llama"), temperature=1.0, compute_dtype=BF16)
        engine = DeepSpeedEngine(module, settings, device=torch.device("cpu"))
        with watched_gathers() as seen:
            for rate in (0.01, 0.02):
                engine.step([((batch,), None)], loss_of, learning_rate=rate)
        state = {name: tensor.clone() for name, tensor in engine.state()}
        results["gathers", gathered_as] = clones(engine.weights()), dict(seen), state
    for kind in ("policy", "critic"):
        settings, weights = OptimiserConfig(adam_eps=1e-5, max_grad_norm=0.1, zero_stage=3), rank == 0
        if kind == "policy":
            module = load_causal_lm(folder.stage("sft").model, weights=weights)
        else:
            module = build_critic(folder.stage("reward").model, "reward", weights=weights)
        meta = sum(parameter.is_meta for parameter in module.parameters())
        without_values = sum(buffer.is_meta for buffer in module.buffers())
        engine = DeepSpeedEngine(module, settings, device=torch.device("cpu"))
        results[kind] = clones(engine.weights()), meta, without_values
    return results


@pytest.fixture(scope="module")
def ranks(run):
    return on_ranks(work, 2, run)


def test_every_zero_stage_takes_the_same_steps_from_held_weights(ranks):
    for results in ranks:
        for stage in (0, 1, 2, 3):
            (plain, none), (held_so, some) = results[stage, False], results[stage, True]
            assert (none, some) == (0, 15)
            assert all(torch.equal(plain[name], held_so[name]) for name in plain) and len(plain) == 2 * 7 * 2


def test_zero_3_starts_from_the_weights_of_rank_0_alone(ranks, run):
    for kind, own in (
        ("policy", load_causal_lm(run.stage("sft").model)), ("critic", build_critic(run.stage("reward").model, "reward")),
    ):  # fmt: skip
        wanted = dict(own.named_parameters())
        for rank, results in enumerate(ranks):
            weights, meta, without_buffers = results[kind]
            assert (meta, without_buffers) == (0 if rank == 0 else len(wanted), 0)
            assert weights.keys() == wanted.keys() and all(torch.equal(weights[name], wanted[name]) for name in wanted)


def test_zero_3_gathers_linear_layers_in_bfloat16_and_takes_the_same_steps(ranks):
    """Llama's seven matrices of each block and its output layer travel so; embeddings and norms are float32."""
    for results in ranks:
        (plain, wide, whole), (low, narrow, state) = results["gathers", torch.float32], results["gathers", BF16]
        assert all(torch.equal(plain[name], low[name]) for name in plain) and plain.keys() == low.keys()
        assert all(torch.equal(whole[name], state[name]) for name in whole)
        assert any(not torch.equal(weight, weight.to(BF16).float()) for weight in low.values())  # sent on with all digits
        assert wide.keys() == {torch.float32} and sum(narrow.values()) == wide[torch.float32]
        matrices = 2 * (4 * 12 * 12 + 3 * 12 * 17) + 31 * 12
        others = 31 * 12 + 5 * 12
        assert narrow[BF16] / narrow[torch.float32] == pytest.approx(matrices / others, rel=0.5)
