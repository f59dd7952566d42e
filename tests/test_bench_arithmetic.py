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

from rlhf_ray.bench import flops, scale
from rlhf_ray.bench.controller import Crowd
from rlhf_ray.bench.flops import SIZES, Shape, Work
from rlhf_ray.bench.ppo import _waiting
from rlhf_ray.bench.random_run import bench_recipe
from rlhf_ray.bench.results import ratios
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
        (scale.MODELS["7B"], 6_738_415_616),  # Llama 2, with a head of its own
        (scale.MODELS["70B"], 68_976_648_192),
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


ONE = Shape(layers=1, width=2, heads=1, vocabulary=3)  # 12 x 4 + 3 x 2 = 54 weights, 108 bytes
GPU = scale.Gpu(flop_per_s=1000, memory=1000, memory_per_s=100, link_per_s=54, network_per_s=27)
RATES = scale.Rates(
    training=0.5, forward=0.5, decode=0.5, launch_s=0.0, step_s=0.0, all_reduce_s=0.0, host_copy_per_s=27, store_per_s=12,
    pull_per_s=18, call_s=0.5, assemble_token_s=0.25, microbatch_tokens=6,
)  # fmt: skip


def test_seconds_of_generation_by_hand():
    """A token caches 2 x 2 x 1 x 2 = 8 bytes. Two rows a replica: a step reads 108 + 2 x 8 x (1 + 1) = 140 bytes at 50 a
    second, 2.8 s; its arithmetic, 2 rows x 120 FLOP at 500 a second, hides behind that."""
    work = Work(rows=4, prompt=1, response=2, epochs=1)
    assert scale.split_of(ONE, GPU) == 1
    assert scale.generate_seconds(ONE, work, 2, GPU, RATES) == pytest.approx(2 * 2.8)
    small = scale.Gpu(flop_per_s=1000, memory=181, memory_per_s=100)  # 0.9 x 181 - 108 = 54.9 bytes: two rows of 24
    assert scale.generate_seconds(ONE, work, 1, small, RATES) == pytest.approx(2 * 2 * 2.8)
    slow = scale.Gpu(flop_per_s=100, memory=1000, memory_per_s=100)  # 240 FLOP a step at 50 a second
    assert scale.generate_seconds(ONE, work, 2, slow, RATES) == pytest.approx(2 * 4.8)
    late = scale.Rates(decode=0.5, forward=0.5, launch_s=0.1, kernels=4, step_s=0.25)
    assert scale.generate_seconds(ONE, work, 2, GPU, late) == pytest.approx(2 * (2.8 + 0.4 + 0.25))


def test_seconds_of_scoring_and_update_by_hand():
    """Three tokens: 2 x 48 x 3 + 4 x 2 x 6 = 336 FLOP; two logits more: 24. Four rows: 1,344 and 1,440."""
    work = Work(rows=4, prompt=1, response=2, epochs=2)
    gpus = {"reward": 1, "reference": 2, "policy": 2, "critic": 4}
    assert scale.score_seconds(ONE, work, gpus, GPU, RATES) == pytest.approx(1344 / 500)  # the reward model's
    # arithmetic 4 x 2 x 1440 / (2 x 500) = 11.52; wire: 2 epochs x 12 / 2 / 6 passes x 4 x 108 x 1/2 / 54 = 8
    assert scale.update_seconds(ONE, work, 2, GPU, RATES) == pytest.approx(11.52)
    # on 16 ranks: 0.72 < one pass an epoch at least, 2 x (2 + 2 + 4) x 54 weights x 15/16 over 27
    assert scale.update_seconds(ONE, work, 16, GPU, RATES) == pytest.approx(2 * 8 * 54 * 15 / 16 / 27)


def test_seconds_of_a_sync_by_hand():
    """Gathering in float32 216/54, to the host 108/27, into the store 108/12, into the generator 108/27."""
    assert scale.store_seconds(ONE, {"policy": 2, "generation": 2}, GPU, RATES) == pytest.approx(4 + 4 + 9 + 4)
    # two nodes of generators: over the network 216/27, and two rounds of pulls 108/18
    assert scale.store_seconds(ONE, {"policy": 16, "generation": 16}, GPU, RATES) == pytest.approx(8 + 4 + 9 + 12 + 4)


def test_seconds_of_a_broadcast_by_hand():
    """Gathered in float32, 216, sent in bfloat16, 108: over links at 54, over the network at 27."""
    assert scale.sync_seconds(ONE, {"policy": 2, "generation": 2}, GPU) == pytest.approx(4 + 2)
    assert scale.sync_seconds(ONE, {"policy": 8, "generation": 8}, GPU) == pytest.approx(4 + 4)
    assert scale.sync_seconds(ONE, {"policy": 16, "generation": 99}, GPU) == pytest.approx(8 + 4)


def test_a_training_rank_is_counted_by_the_memory_plan():
    """70 B on 16 ranks: 16 bytes each, 68.7 GB; a bucket of 2 GB and the share of a gradient, 4; gathered weights, 4; 16,384 tokens
    with checkpoints at 80 blocks of width 8,192, 43 GB, and what one block and the end keep."""
    work, rates = Work(rows=8, prompt=512, response=512, epochs=1), scale.Rates()
    found = scale.training_bytes(scale.MODELS["70B"], work, 16, rates)
    block = 16384 * (30 * 8192 + 2 * 2 * 1024 + 8 * 28672)
    kept = 16384 * 8192 * (80 * 4 + 10) + block
    state = 16 * scale.MODELS["70B"].weights / 16
    copies = 2 * (32000 * 8192 + scale.MODELS["70B"].block_weights)
    assert found == pytest.approx(0.8e9 + state + 2e9 + 4e9 + 4e9 + kept + 2 * 16384 * 32000 + copies, rel=1e-6)


def test_where_it_bends_is_the_first_phase_that_stops_shrinking():
    def row(**phases):
        return scale.Iteration(phases, "", 1, 0.5, 0.0)

    found = [(8, scale.Iteration({}, "too large", 1, 0.0, 0.0)), (16, row(update=8.0, sync=1.0)), (32, row(update=4.0, sync=1.0))]
    assert scale.bend_of(found).startswith("sync first, at 32 GPUs: 1.0 s where half of them take 1.0 (20%")
    assert scale.bend_of(found[:2]) == "nowhere up to here"
    few = [(16, row(update=80.0, sync=1.0)), (32, row(update=40.0, sync=1.0))]  # a fortieth
    assert scale.bend_of(few) == "nowhere up to here"


def test_what_does_not_fit_is_named():
    work = Work(rows=8, prompt=1, response=1, epochs=1)
    h100 = scale.GPUS["h100"]
    found = scale.iteration(scale.MODELS["70B"], work, 8, h100, scale.Rates(), chunk_size=8)
    assert found.misfit == "generation does not fit" and found.phases == {}  # on 2 GPUs of 80 GB, 140 GB and a cache
    small = scale.Rates(microbatch_tokens=1024)
    for count, misfit in ((64, "training state does not fit"), (72, "")):  # 16 bytes x 68.7e9 over 16, over 18 GPUs
        found = scale.iteration(scale.MODELS["70B"], work, count, h100, small, chunk_size=8)
        assert found.misfit == misfit  # 68.7 and 61.1 GB each, beside 16
    assert "137 GB on one GPU" in scale.copy_misfit(scale.MODELS["70B"], h100)
    assert scale.copy_misfit(scale.MODELS["7B"], h100) == ""
    found = scale.iteration(scale.MODELS["7B"], work, 8, h100, scale.Rates(), chunk_size=8)
    assert found.misfit == "" and found.split == 1
