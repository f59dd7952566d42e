"""The benchmarks' arithmetic, statistics and cost model, worked by hand."""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel

from rlhf_ray.bench import flops
from rlhf_ray.bench.controller import Crowd
from rlhf_ray.bench.flops import SIZES, Shape, Work
from rlhf_ray.bench.ppo import _waiting
from rlhf_ray.bench.random_run import bench_recipe
from rlhf_ray.bench.results import ratios
from rlhf_ray.bench.scale_plan import MODELS
from rlhf_ray.bench.serve import quantile
from rlhf_ray.bench.sync import shape_of_weights
from rlhf_ray.bench.trend import slope
from rlhf_ray.bench.yardsticks.pss import tree_pss
from rlhf_ray.data.tokens import encode_pairs
from rlhf_ray.errors import UserError
from rlhf_ray.models.load import build_causal_lm
from rlhf_ray.models.tokenizer import word_tokenizer

TINY = Shape(layers=2, width=8, heads=2, vocabulary=10)
WORK = Work(rows=5, prompt=2, response=2, epochs=3)


def test_flop_of_the_phases_by_hand():
    """A block has 12 x 8 x 8 = 768 weights. Three tokens: 2 x 768 x 3 + 4 x 8 x (1 + 2 + 3) = 4,800 a block; four: 6,464.
    A token's logits: 2 x 8 x 10 = 160."""
    assert TINY.block_weights == 768
    assert flops.blocks(TINY, 3) == 2 * 4800 and flops.blocks(TINY, 4) == 2 * 6464
    assert flops.head(TINY, 2) == 320
    found = flops.phases(TINY, WORK)
    assert found["generate"] == 5 * (9600 + 320)  # three tokens are fed, two drawn
    assert found["score"] == 2 * 5 * (12928 + 320) + 2 * 5 * 12928
    assert found["update"] == 3 * 3 * (5 * (12928 + 320) + 5 * 12928)
    assert found["assemble"] == found["sync"] == 0


def test_flop_that_are_left_by_hand():
    """A feed-forward layer has 2 x 8 x 32 = 512 weights: 5,120 operations for a token of each of the five rows. The last one
    leaves out the prompt's two tokens, for the reward model three of the four. An update starts from a forward pass."""
    found = flops.computed(TINY, WORK)
    language, value, reward = 66_240 - 2 * 5120, 64_640 - 2 * 5120, 64_640 - 3 * 5120
    assert found["score"] == 2 * language + value + reward == 215_680
    assert found["update"] == (3 * 3 - 1) * (language + value) == 883_200
    assert found["generate"] == flops.phases(TINY, WORK)["generate"]


def test_flop_with_adapters_by_hand():
    """Rank 2 at GPT-2's matrices of width 8: 2 x (8 + 24 + 8 + 8 + 8 + 32 + 32 + 8) = 256 weights a block. Two blocks, 20 tokens,
    policy and critic: 2 x 2 x 20 x 2 x 256 operations. No gradient of the frozen matrices."""
    work = Work(rows=5, prompt=2, response=2, epochs=3, lora_rank=2)
    beside, trained = 40_960, 66_240 + 64_640
    assert flops.adapters(TINY, work) == beside
    found = flops.phases(TINY, work)
    assert found["score"] == 2 * trained + beside
    assert found["update"] == 3 * (2 * trained + 3 * beside)
    left = flops.computed(TINY, work)
    trained -= 2 * 2 * 5120
    # of the forward passes that score: language twice and value once less 2 tokens, the reward model less 3
    assert left["score"] == 2 * 66_240 + 2 * 64_640 - 5120 * (2 + 2 + 2 + 3) + beside
    assert left["update"] == 3 * (trained + 2 * beside) + 2 * (trained + beside)


def test_adapters_of_grouped_heads_by_hand():
    """SmolLM2's block: queries and output 1,152 inputs and outputs each, keys and values 768, three of 2,112; 30 blocks of them
    have 4,884,480 weights at rank 16 (`trained_part.adapted_layers` of the real model has as many)."""
    shape = flops.SIZES["smollm2"]
    assert shape.block_weights == 2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536
    assert 30 * shape.adapter_weights(16) == 30 * 16 * (2 * 1152 + 2 * 768 + 3 * 2112) == 4_884_480


def test_rays_share_by_hand():
    """Of 2 s: 0.1 s beyond the generator, 0.05 beyond the slowest scorer, 0.02 beyond the slower update, and all of the sync."""
    busy = {"generation": 0.4, "reward": 0.1, "reference": 0.2, "policy": 0.35, "critic": 0.3, "experience": 0.01,
            "policy_update": 1.08, "critic_update": 0.9, "policy_sync": 0.004}  # fmt: skip
    took = {"generate": 0.5, "score": 0.4, "assemble": 0.01, "update": 1.1, "sync": 0.03}
    run = {"seconds": 2.0} | {f"busy/{name}_s": value for name, value in busy.items()}
    found = _waiting([run | {f"time/{phase}_s": value for phase, value in took.items()}])
    expected = {"generate": 0.05, "score": 0.025, "assemble": 0.0, "update": 0.01, "sync": 0.015, "iteration": 0.1}
    assert found == pytest.approx(expected)


def test_the_benchmarks_reward_model_reads_whole_responses():
    """Its text has to come back as the ids that it was: as one unknown word, a response would cost one token."""
    tokenizer = word_tokenizer(500)
    prompt, response = [3, 497, 1], [0, 12, 345, 6]
    texts = [tokenizer.decode(ids) for ids in (prompt, response)]
    assert encode_pairs(tokenizer, texts[:1], texts[1:]) == [([*prompt, *response, tokenizer.eos_token_id], 3)]


def test_flop_of_a_forward_pass_against_torchs_own_counter():
    """torch counts attention's products whole; the causal half of them is never needed."""
    config = GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=10, n_positions=16, attn_implementation="eager")
    tokens = 7
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        GPT2LMHeadModel(config)(torch.zeros(1, tokens, dtype=torch.long), use_cache=False)
    hidden = 2 * 4 * 8 * (tokens * tokens - tokens * (tokens + 1) // 2)
    assert counter.get_total_flops() == flops.blocks(TINY, tokens) + flops.head(TINY, tokens) + hidden


@pytest.mark.parametrize(
    ("shape", "published"),
    [
        (SIZES["124m"], 124_439_808),  # GPT-2, with positions, biases and norms
        (MODELS["7B"], 6_738_415_616),  # Llama 2, with a head of its own
        (MODELS["70B"], 68_976_648_192),
    ],
)
def test_weights_are_those_of_the_published_models(shape, published):
    assert shape.weights == pytest.approx(published, rel=0.02)


def test_the_llama_of_the_benchmark_is_the_one_that_is_built():
    shape = flops.shape_of("1b", layers=2, width=96, heads=2, vocabulary=500)
    recipe = bench_recipe(
        shape, Work(rows=2, prompt=2, response=2, epochs=1), microbatch=2, precision="auto", resources={}
    )
    model = build_causal_lm(recipe.model, word_tokenizer(500), 0)
    assert model.config.model_type == "llama"
    norms = (2 * 2 + 1) * 96
    assert sum(parameter.numel() for parameter in model.parameters()) == shape.weights + norms
    assert SIZES["1b"].weights == pytest.approx(1e9, rel=0.05)


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="the system does not tell")
def test_memory_of_a_tree_of_processes():
    """A child that has written 200 MB; this process itself; one that never was."""
    before = tree_pss(os.getpid())
    script = "import time; kept = bytes(range(256)) * 800_000; print('ready', flush=True); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    try:
        assert child.stdout.readline() == b"ready\n"
        assert 2.04e8 < tree_pss(child.pid) < 2.5e8
        assert tree_pss(os.getpid()) - before > 1.9e8
    finally:
        child.kill()
        child.wait()
    assert tree_pss(2**22 + 1) is None


def test_shares_of_peak_by_hand():
    rows = flops.peak_shares({"a": 2.0, "b": 1.0, "c": 0.0}, {"a": 10, "b": 20, "c": 0}, 20.0)
    assert [(row.phase, row.peak_share) for row in rows] == [("a", 0.25), ("b", 1.0), ("c", 0.0), ("iteration", 0.5)]


def test_options_lie_over_a_named_size():
    shape = flops.shape_of("14m", layers=None, width=None, heads=None, vocabulary=None)
    assert (shape.layers, shape.width, shape.heads, shape.vocabulary) == (6, 384, 6, 8192)
    shape = flops.shape_of("14m", layers=2, width=None, heads=None, vocabulary=300)
    assert (shape.layers, shape.width, shape.vocabulary) == (2, 384, 300)
    with pytest.raises(UserError, match="--size '2b' is none of 4m, 14m, 124m, smollm2, 1b"):
        flops.shape_of("2b", layers=None, width=None, heads=None, vocabulary=None)


@pytest.mark.parametrize("millions", [2.0, 4.25, 25, 125, 250])
def test_a_model_of_so_many_weights(millions):
    shape = shape_of_weights(millions * 1e6)
    assert shape.weights == pytest.approx(millions * 1e6, rel=0.2)
    assert shape.width % shape.heads == 0


def test_slope_and_interval_by_hand():
    """Places 0 1 2 3, values 0 1 1 2: slope 3/5. Residuals -0.1 0.3 -0.3 0.1, their squares 0.2, over 2 degrees of freedom
    0.1, over the places' squares (5) 0.02; Student's t with 2 degrees is 4.303."""
    found = slope([0, 1, 2, 3], [0, 1, 1, 2])
    assert found.mean == pytest.approx(0.6)
    assert found.high - found.mean == pytest.approx(4.303 * math.sqrt(0.02))
    assert found.mean - found.low == pytest.approx(4.303 * math.sqrt(0.02))


def test_a_slope_is_not_surer_for_values_that_repeat():
    places, values = np.arange(20) * 10 + 4.5, np.random.default_rng(0).normal(size=20)
    once, often = slope(places, values), slope(np.arange(200), np.repeat(values, 10))
    assert (often.mean, often.low, often.high) == pytest.approx((once.mean, once.low, once.high))


def test_the_interval_of_a_slope_holds_it_as_often_as_it_says():
    """2,000 noisy lines of slope 1/2."""
    draws, places = np.random.default_rng(1), np.arange(20.0)
    held = [found.low <= 0.5 <= found.high for found in (slope(places, 0.5 * places + draws.normal(size=20))
                                                         for _ in range(2000))]  # fmt: skip
    assert 0.935 < np.mean(held) < 0.965


def test_quantiles_are_values_that_occurred():
    ordered = [float(each) for each in range(1, 21)]
    assert (quantile(ordered, 0.5), quantile(ordered, 0.95), quantile(ordered, 1.0)) == (10.0, 19.0, 20.0)
    assert quantile([3.0], 0.5) == quantile([3.0], 0.95) == 3.0


def test_ratios_are_of_pairs():
    assert ratios([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == {"median": 2.0, "low": 1.0, "high": 3.0}


def test_calls_of_a_step_by_hand():
    """Ten rows in chunks of 4 are 3 chunks: 15 calls; assembling 1; updates 2 x 2, weights 2; three generators load."""
    crowd = Crowd(generators=3, processes=1, rows=4, work=Work(rows=10, prompt=1, response=1, epochs=1), weight_bytes=8,
                  ranks=2)  # fmt: skip
    assert crowd.calls == 15 + 1 + 4 + 2 + 3
