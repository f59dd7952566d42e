"""The memory plan per GPU and per node: against published figures, against processes that were measured, and what it refuses."""

import ast
import json
import pickle
import subprocess
import sys

import pytest
import torch
from tiny import tiny_recipe

from rlhf_ray.actors.checks import left_on_cpus
from rlhf_ray.actors.memory_plan import Precisions, memory_problems, phases_of
from rlhf_ray.actors.nodes import Node, local_memory, rented_nodes
from rlhf_ray.actors.ray_stages import cluster_problems
from rlhf_ray.actors.weight_transport import planned_transport
from rlhf_ray.bench.memory_peaks import RESULTS, SETUPS, measured, planned
from rlhf_ray.errors import UserError
from rlhf_ray.generation.vllm_weights import copy_device, untied
from rlhf_ray.models.activations import block_bytes
from rlhf_ray.models.generation_memory import VLLM_ELSE, cache_of, gpu_memory_utilization
from rlhf_ray.models.held_weights import held_weights
from rlhf_ray.models.host_memory import HostCopy
from rlhf_ray.models.memory import memory_plan
from rlhf_ray.models.planned_process import CONTEXT
from rlhf_ray.models.size import ModelShape, shape_of_model
from rlhf_ray.models.training_state import BUCKET, MIXED, buffer_bytes, model_state

GB = 1e9
WRITING = "update beside a checkpoint"


def phases(recipe, nodes, stages=("ppo",), **options):
    return phases_of(recipe, nodes, Precisions(stages=dict.fromkeys(recipe.trained, 4)), stages=stages, **options)


def problems(recipe, host, gpus=(), stages=("ppo",), **options):
    nodes = [Node("this machine", {"CPU": 64.0, "GPU": float(len(gpus))}, host, tuple(gpus))]
    return memory_problems(recipe, nodes, phases(recipe, nodes, stages, **options))


# ---- published figures


@pytest.mark.parametrize("stage, gigabytes", [(0, 120), (1, 31.4), (2, 16.6), (3, 1.88)])
def test_zero_divides_what_its_paper_says(stage, gigabytes):
    """Figure 1 of Rajbhandari et al. 2020 (arXiv 1910.02054): 7.5 B parameters, 64 GPUs, 16 bytes each, mixed-precision Adam."""
    state = model_state(7_500_000_000, zero_stage=stage, ranks=64, numbers=MIXED)
    assert sum(state.parts.values()) / GB == pytest.approx(gigabytes, abs=0.06)


def test_offload_leaves_what_its_paper_says():
    """Table 1 of Ren et al. 2021 (ZeRO-Offload, arXiv 2101.06840): 2 of 16 bytes stay on the GPU, 16-bit weights."""
    state = model_state(10**10, zero_stage=2, ranks=1, numbers=MIXED, offload_optimizer=True)
    assert (sum(state.parts.values()), sum(state.host.values())) == (2e10, 14e10)


def test_float32_weights_take_sixteen_bytes_too():
    """4 + 4 + 8; stages 1 and 2 copy the rank's share (4 / 8 ranks more), stage 3 does not."""
    sizes = [sum(model_state(8, zero_stage=stage, ranks=8).parts.values()) for stage in range(4)]
    assert sizes == [8 * 16, 8 * 8 + 8 + 4, 8 * 4 + 4 + 8 + 4, 16]


def test_a_block_keeps_what_is_published():
    """Korthikanti et al. 2022 (arXiv 2205.05198, section 4.1): 34 bytes per token and channel in 16 bits, two of them dropout's
    masks. Here the input of each of the two norms is float32, two bytes more."""
    shape = ModelShape(
        parameters=0, blocks=(), embeddings=0, layers=1, width=1, vocabulary=0, key_value_width=1, heads=1, feed_forward=4,
        family="gpt2", gated=False,
    )  # fmt: skip
    assert block_bytes(shape, tokens=1, longest=4096, itemsize=2, on_gpu=True) == 34 - 2 + 2 * 2


def test_a_token_of_the_cache_takes_what_is_published():
    """Kwon et al. 2023 (vLLM, arXiv 2309.06180, section 3): OPT-13B, 40 layers of 5120, 800 KB per token in 16 bits."""
    shape = ModelShape(
        parameters=0, blocks=(), embeddings=0, layers=40, width=5120, vocabulary=0, key_value_width=5120, heads=40,
        feed_forward=20480, family="opt", gated=False,
    )  # fmt: skip
    assert cache_of(shape, rows=1, longest=1, itemsize=2) == 800 * 1024


# ---- measured processes


@pytest.mark.parametrize("name", json.loads(RESULTS.read_text()))
def test_the_plan_is_within_15_percent_of_what_was_measured(name):
    """results/bench/memory.json, of rlhf_ray/bench/memory_peaks.py. (Some trainers were measured without what they write.)"""
    phases = json.loads(RESULTS.read_text())[name]
    assert planned(name, written=wrote(phases)) == pytest.approx(max(phases.values()) * 1e6, rel=0.15)


def wrote(phases):
    """Whether what trainers write was there at a phase's peak. Of supervised stages it was not."""
    return WRITING in phases or not phases.keys() & {"update", "training"}


def test_what_trainers_write_was_measured_too():
    kept = json.loads(RESULTS.read_text())
    assert {"policy", "policy lora bf16", "policy entropy"} <= {name for name, phases in kept.items() if WRITING in phases}
    for phases in kept.values():
        if WRITING in phases and phases["update"] > 1000:  # MB; the copy is of all weights and moments
            assert phases[WRITING] > phases["update"] + 250


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", SETUPS)
def test_the_plan_is_within_15_percent_of_what_a_process_takes_now(name):
    phases = measured(name)
    assert planned(name, written=wrote(phases)) == pytest.approx(max(phases.values()), rel=0.15)


# ---- per GPU and per node


SEVEN = {"layers": 32, "width": 4096, "heads": 32, "positions": 512, "vocab_size": 32_000, "architecture": "llama"}


def test_what_shares_a_gpu_is_added_up_on_it_and_nowhere_else():
    """Two ranks, each with a generator: each GPU has one of both, whatever all GPUs have in sum."""
    shared = {"policy": {"actors": 2, "gpus": 0.5}, "generation": {"actors": 2, "gpus": 0.5, "with": "policy"}}
    recipe, nodes = tiny_recipe(resources=shared, ppo={"steps_ahead": 1}), rented_nodes("1x2xH100")
    (phase,) = phases(recipe, nodes)
    rows = {row.role: row.process for row in memory_plan(recipe)}
    needed = 2 * CONTEXT + rows["policy"].gpu + rows["generation"].gpu
    assert {place: sum(share.size for share in shares) for place, shares in phase.gpus.items()} == {
        (0, 0): pytest.approx(needed), (0, 1): pytest.approx(needed),
    }  # fmt: skip
    # Twice that is there in sum, but not on either GPU.
    small = [Node("small", {"CPU": 8.0, "GPU": 3.0}, 1e12, (needed * 0.9,) * 3)]
    (problem,) = memory_problems(recipe, small, phases(recipe, small))
    assert "of small has" in problem and "(2 GPUs like it)" in problem


def test_who_shares_a_gpu_takes_turns_on_it():
    """1.27 B weights, all roles on one GPU, bf16: while the policy updates, the others have their weights there and no more; the
    critic updates after it. Moments, 8 bytes per weight, are on the host all the time."""
    model = {"from_scratch": SEVEN | {"layers": 24, "width": 2048, "heads": 16}}
    roles = {"policy": {"gpus": 0.2}} | {
        role: {"gpus": 0.2, "with": "policy"} for role in ("critic", "generation", "reward", "reference")
    }
    recipe, nodes = tiny_recipe(model=model, resources=roles), rented_nodes("1x1xH100")
    rows = {row.role: row.process for row in memory_plan(recipe, way="ipc")}
    found = phases(recipe, nodes)
    assert [phase.turn for phase in found] == ["rollout", "policy update", "critic update"]
    sizes = [{share.process: share.size - CONTEXT for share in phase.gpus[0, 0]} for phase in found]
    shape = shape_of_model(recipe)
    weights, body = 4.0 * shape.parameters, 4.0 * shape.body
    drawn_with = rows["generation"].parts["weights"]
    shared = 2.0 * shape.parameters  # what generators on the same GPU copy from (IPC)
    assert drawn_with == 2.0 * shape.parameters
    assert sizes[1]["generation 0"] == sizes[2]["generation 0"] == drawn_with < sizes[0]["generation 0"]
    assert sizes[1]["critic 0"] == body and sizes[2]["policy 0"] == weights + shared
    assert sizes[1]["policy 0"] == rows["policy"].gpu > 4 * weights  # gradients and two moments beside them
    assert weights + shared < sizes[0]["policy 0"] < 2 * weights + shared
    assert rows["policy"].host["resting moments"] == 2 * weights and rows["critic"].host["resting moments"] == 2 * body
    assert [bool(phase.hosts) for phase in found] == [True, False, False]
    in_sum = sum(process.gpu for process in rows.values())
    assert max(sum(each.values()) for each in sizes) < 0.7 * in_sum


def test_the_evaluation_and_a_server_are_planned_too():
    """Two models of 8.6 MB that draw one after the other, the second in a copy of its own on CPUs; then the reward model beside the
    first. A server: one model and the cache of 32 rows of 26 tokens, 2 layers of 2 x 32 floats."""
    recipe = tiny_recipe()
    nodes = [Node("here", {"CPU": 8.0}, 4e9)]
    evaluation, serving = phases(recipe, nodes, stages=("evaluation", "serving"))
    assert (evaluation.name, serving.name) == ("evaluation", "serving")
    model = 4 * 37_120
    process = evaluation.processes["evaluation"]
    assert process.parts["weights"] == 2 * model and process.parts["copies"] == model
    assert serving.processes["serving"].parts["cache"] == 32 * 26 * 2 * 2 * 32 * 4
    large = tiny_recipe(
        model={"from_scratch": SEVEN}, generation={"precision": "bfloat16"}, resources={"generation": {"gpus": 1}}
    )
    rented = [Node("node", {"CPU": 8.0, "GPU": 1.0}, 1e12, (24e9,))]
    told = memory_problems(large, rented, phases(large, rented, stages=("evaluation", "serving")))
    assert len(told) == 1 and told[0].startswith("the evaluation needs about 2") and "evaluate the run's models where" in told[0]


def test_a_generator_split_over_gpus_takes_a_part_of_each():
    recipe = tiny_recipe(
        model={"from_scratch": SEVEN}, generation={"engine": "vllm", "tensor_parallel": 4, "precision": "bfloat16", "stop": ()},
        resources={"generation": {"gpus": 4}},
    )  # fmt: skip
    whole = {row.role: row.process for row in memory_plan(recipe)}["generation"]
    assert whole.split["copies"] == whole.host["copy beside the engine"] == 2 * shape_of_model(recipe).parameters
    assert "weights" not in whole.parts and whole.gpus == 4
    assert whole.gpu == whole.state + whole.work + (whole.split["copies"] + whole.split["cache"]) / 4
    (phase,) = phases(recipe, rented_nodes("1x8xH100"))
    assert [place for place, shares in phase.gpus.items() if shares[0].process == "generation 0"] == [(0, gpu) for gpu in range(4)]


def test_offloading_moves_memory_to_the_host():
    """1.3 B weights in two shares at ZeRO 3: of 16 bytes, gradients and moments leave the GPU."""
    model = {"from_scratch": SEVEN | {"layers": 24, "width": 2048, "heads": 16}}
    group = {"actors": 2, "gpus": 1, "zero_stage": 3}
    plans = [
        {row.role: row.process for row in memory_plan(tiny_recipe(model=model, resources={"policy": group | more}))}["policy"]
        for more in ({}, {"offload_optimizer": True})
    ]
    share = plans[0].parts["weights"]
    assert plans[0].state == 4 * share and plans[1].state == share
    assert plans[1].host["gradients"] == share and plans[1].host["optimiser"] == 3 * share  # masters of their own, too
    assert plans[0].host == {"copy for a checkpoint": 3 * share}


# ---- what is frozen, what is written, who loads


def test_frozen_weights_take_two_bytes_except_embeddings():
    """Two blocks of 12 x 32**2 + 13 x 32 and 364 embeddings of 32, whose 300 first are the output layer too; adapters of rank 4 at
    four layers of each block."""
    recipe = tiny_recipe(reward={"lora": {"rank": 4}})
    shape, block, adapters = shape_of_model(recipe), 12 * 32**2 + 13 * 32, 4 * 2 * (128 + 64 + 160 + 160)
    size, lora = {"itemsize": 2, "language": True}, recipe.reward.lora
    one = held_weights(shape, recipe.model, lora=lora, freeze_layers=0, **size)
    rest = 2 * block + 64
    assert (one.trained, one.frozen) == (adapters, 4 * 364 * 32 + 2 * rest) and one.cast == adapters + 300 * 32
    assert held_weights(shape, recipe.model, lora=lora, freeze_layers=0, itemsize=4, language=True).frozen == 4 * shape.parameters
    first = held_weights(shape, recipe.model, lora=None, freeze_layers=1, **size)
    assert (first.trained, first.frozen) == (block + 64, 4 * 364 * 32 + 2 * block) and first.cast == block + 64 + 300 * 32
    whole = held_weights(shape, recipe.model, lora=None, freeze_layers=0, **size)
    assert (whole.trained, whole.frozen, whole.cast) == (shape.parameters, 0.0, rest + 300 * 32)
    assert whole.cast_at_once == 300 * 32 + block
    scorer = held_weights(shape, recipe.model, lora=None, freeze_layers=0, itemsize=2, language=False)
    assert scorer.cast == rest  # no logits


def test_an_output_layer_of_its_own_is_no_part_of_a_critic():
    shape = ModelShape(
        parameters=1000, blocks=(300, 300), embeddings=200, layers=2, width=2, vocabulary=100, key_value_width=2, heads=1,
        feed_forward=8, family="llama", gated=True, output=200,
    )  # fmt: skip
    model = tiny_recipe().model
    language, value = (held_weights(shape, model, lora=None, freeze_layers=0, language=each, itemsize=2) for each in (True, False))
    assert (language.trained, value.trained) == (1000, 800) and (language.cast, value.cast) == (800, 600)


def test_buckets_are_doubled_where_they_overlap():
    sizes = {"weights": 10**9, "held": 4e9, "ranks": 2, "on_gpu": True}
    share = 4 * 10**9 / 2
    assert buffer_bytes(10**9, zero_stage=2, **sizes) == {"buckets": 2 * 4 * BUCKET + share}
    assert buffer_bytes(10**9, zero_stage=2, low_sums=True, **sizes) == {"buckets": 2 * 8 * BUCKET + share}
    assert buffer_bytes(10**9, zero_stage=3, **sizes) == {"buckets": 4 * BUCKET + share, "gathered": 4e9}
    assert buffer_bytes(10**9, zero_stage=3, low_sums=True, **sizes)["buckets"] == 6 * BUCKET + share
    on_cpu = buffer_bytes(10**6, weights=10**6, held=4e6, zero_stage=1, ranks=2, on_gpu=False)
    assert on_cpu == {"buckets": 4e6 + 2e6}  # what is written


def test_a_checkpoint_s_copy_stands_beside_the_next_update():
    recipe = tiny_recipe(resources={"policy": {"actors": 2, "zero_stage": 1}})
    rows = {row.role: row.process for row in memory_plan(recipe)}
    trained = shape_of_model(recipe).parameters
    for role, ranks in (("policy", 2), ("critic", 1)):
        assert rows[role].host["copy for a checkpoint"] == 12 * trained / ranks
    policy = rows["policy"]
    assert policy.moments == {"snapshot": 12 * trained / 2, "model to be written": 8 * trained}
    assert policy.of_number(1).moments == {"snapshot": 12 * trained / 2}  # rank 0 writes
    assert policy.memory - policy.state - policy.host["copy for a checkpoint"] >= policy.work


def test_weights_on_their_way_are_counted_where_they_stand():
    """Policy and generators each on GPUs of their own, ahead: a 16-bit copy on the host of the policy's first rank, and where
    generators take weights while they draw, two on theirs. Through the store: what is put, what nobody has waited for yet, and
    what is read."""
    group = {"policy": {"gpus": 1, "actors": 2}, "generation": {"gpus": 1}}
    staged, received, stored = [], [], []
    for ahead, in_flight, way in ((0, False, "auto"), (2, False, "auto"), (2, True, "auto"), (3, False, "object_store")):
        recipe = tiny_recipe(
            ppo={"steps_ahead": ahead, "weights_in_flight": in_flight}, resources=group | {"weight_transport": way}
        )
        (phase,) = phases(recipe, rented_nodes("1x8xH100"))
        rows = phase.processes
        staged.append([rows["policy"].of_number(rank).host.get("staged weights", 0) for rank in (0, 1)])
        received.append(rows["generation"].host.get("received weights", 0))
        store = sum(share.size for share in phase.hosts[0] if share.process == "object store")
        stored.append(store - 2 * 12 * 2 * 37_120)  # without snapshots of policy and critic
    assert staged == [[0, 0], [2 * 37_120, 0], [2 * 37_120, 0], [0, 0]] and received == [0, 0, 4 * 37_120, 0]
    assert stored == [0, 0, 0, 5 * 2 * 37_120]


def test_the_way_of_new_weights_is_the_one_that_their_places_allow():
    """Two ranks on two GPUs. Handles reach the generator beside rank 0; two generators, one of them beside it, neither handles
    nor a broadcast; generators on GPUs that others share, a broadcast. Only handles take a copy on rank 0's GPU."""
    group = {"actors": 2, "gpus": 0.4}
    reference = {"gpus": 0.3, "with": "generation"}
    ways = {
        "ipc": {"generation": {"gpus": 0.4, "with": "policy"}},
        "object_store": {"generation": {"actors": 2, "gpus": 0.4, "with": "policy"}},
        "collective": {"generation": {"actors": 2, "gpus": 0.6}, "reference": reference, "critic": {"gpus": 0.4, "with": "policy"}},
    }
    for way, roles in ways.items():
        recipe, nodes = tiny_recipe(resources={"policy": group} | roles), rented_nodes("1x8xH100")
        first, *_ = phases(recipe, nodes)
        assert planned_transport(recipe, first.layout) == way
        assert ("shared weights" in first.processes["policy"].parts) == (way == "ipc")
        assert ("weights to send" in first.processes["policy"].moments) == (way == "object_store")
    told = tiny_recipe(resources={"policy": group, "weight_transport": "ipc"} | ways["object_store"])
    (problem,) = cluster_problems(told, ["ppo"], [node.amounts for node in rented_nodes("1x8xH100")])
    assert "weight_transport is ipc" in problem and "GPU 0 of node 0, GPU 1 of node 0, which allows object_store" in problem


def test_only_rank_0_loads_before_zero_3_cuts(tmp_path):
    """A model from elsewhere, whose file may be of another dtype: each process that reads it has its own 4 bytes of each weight."""
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192,
              "num_hidden_layers": 16, "num_attention_heads": 16, "vocab_size": 32_000, "max_position_embeddings": 512}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))

    def recipe_of(zero_stage):
        group = {"actors": 4, "gpus": 1, "zero_stage": zero_stage}
        return tiny_recipe(sft=None, reward=None, model={"name_or_path": str(tmp_path)}, resources={"policy": group},
                           ppo={"reward_function": "user_scores:length", "critic_init": "sft", "minibatch_size": 4,
                                "microbatch_size": 1})  # fmt: skip

    weights = 4 * shape_of_model(recipe_of(3)).parameters
    loading = {}
    for stage in (2, 3):
        process = next(row.process for row in memory_plan(recipe_of(stage)) if row.role == "policy")
        loading[stage] = [process.of_number(rank).loading[1] for rank in range(4)]
    assert loading == {2: [weights] * 4, 3: [weights, 0, 0, 0]}
    (phase,) = phases(recipe_of(3), rented_nodes("1x8xH100"))
    sizes = {share.process: share.size for share in phase.hosts[0]}
    assert sizes["policy 0"] > sizes["policy 1"] == sizes["policy 3"]


@pytest.mark.parametrize(
    "sections, host, gpus, says",
    [
        ({}, 1e9, [], ["needs about 2.5 GB there, and this machine has 1.0 GB", "what 5 processes take", "use fewer actors"]),
        ({"model": {"from_scratch": {"layers": 24, "width": 1024, "heads": 16, "positions": 64, "vocab_size": 30_000}}},
         8e9, [], ["the copy for a checkpoint of policy, 4.0 GB", "raise resources.policy.actors", "use a smaller model"]),
        ({"ppo": {"microbatch_size": 4, "minibatch_size": 4}, "generation": {"max_new_tokens": 40_000},
          "model": {"from_scratch": {"layers": 2, "width": 32, "heads": 2, "positions": 50_000, "vocab_size": 40_000}}},
         8e9, [], ["the logits of policy", "lower ppo.microbatch_size"]),
        ({"generation": {"chunk_size": 100_000, "max_new_tokens": 40}}, 4e9, [],
         ["the cache of generation", "lower generation.chunk_size"]),
        ({"model": {"from_scratch": {"layers": 24, "width": 2048, "heads": 16, "positions": 64, "vocab_size": 30_000}},
          "resources": {"policy": {"gpus": 0.5}, "critic": {"gpus": 0.5, "with": "policy"}}},
         1e12, [24e9], ["GPU 0 of this machine has 24.0 GB", "the optimiser of", "zero_stage to 3"]),
    ],
    ids=["processes", "weights", "logits", "cache", "gpu"],
)  # fmt: skip
def test_what_cannot_fit_is_told_before_the_start(sections, host, gpus, says):
    (problem,) = problems(tiny_recipe(**sections), host, gpus)
    assert all(part in problem for part in says), problem


def test_all_that_fits_is_no_problem():
    assert problems(tiny_recipe(), 4e9) == []
    assert problems(tiny_recipe(), 4e9, stages=("sft", "reward", "ppo")) == []


def test_forks_share_what_they_imported():
    """Five actors: 5 x 0.44 GB by themselves, 0.44 + 5 x 0.12 as forks, and 0.3 for what libraries make at their first use."""
    assert len(problems(tiny_recipe(), 1.5e9)) == 1
    assert problems(tiny_recipe(), 1.5e9, forked=True) == []
    assert len(problems(tiny_recipe(), 1.2e9, forked=True)) == 1


def test_only_what_top_k_bounds_is_held_against_a_recipe():
    """8 x 2,000 rollouts of 40 tokens among 200 of 300: 0.51 GB, in two copies twice over."""
    big = {"rollout_batch_size": 16_000, "minibatch_size": 4}
    recipes = [
        tiny_recipe(generation={"max_new_tokens": 40, **cut}, ppo=big) for cut in ({"top_p": 0.667}, {"top_k": 200})
    ]
    assert problems(recipes[0], 2.5e9, forked=True) == []
    (problem,) = problems(recipes[1], 2.5e9, forked=True)
    assert "among, up to 200 of them; lower generation.top_k" in problem


def test_a_stage_that_does_not_fit_is_told_with_what_to_lower():
    batch = {"microbatch_size": 4096, "batch_size": 4096}
    (told,) = problems(tiny_recipe(sft=batch), 2e9, stages=["sft"])
    assert "the stage sft needs about" in told and "lower sft.microbatch_size or sft.max_length" in told
    large = {"from_scratch": {"layers": 24, "width": 1024, "heads": 16, "positions": 64, "vocab_size": 30_000}}
    small = {"microbatch_size": 1, "batch_size": 1, "max_length": 16}
    recipe = tiny_recipe(model=large, sft=small, reward=small)
    words = problems(recipe, 2e9, stages=["sft", "reward"])
    assert len(words) == 2 and all("set sft.lora" in each or "set reward.lora" in each for each in words)
    assert len(problems(recipe, 2e9, stages=["reward"])) == 1  # the other is done
    on_gpu = problems(tiny_recipe(sft=batch | {"gpus_per_worker": 1}), 8e9, [3e9], stages=["sft"])
    assert len(on_gpu) == 1 and "GPU 0 of this machine" in on_gpu[0]  # not this memory


def test_a_stage_whose_measuring_does_not_fit_is_told_so():
    """A reward model of 6.7 B, its state over eight ranks: measured in float32 it takes 27 GB of one GPU."""
    recipe = tiny_recipe(model={"from_scratch": SEVEN}, reward={"workers": 8, "gpus_per_worker": 1, "zero_stage": 3,
                         "offload_optimizer": True, "microbatch_size": 1})  # fmt: skip
    (problem,) = problems(recipe, 2e12, [24e9] * 8, stages=("reward",))
    assert "the model in float32, as it is measured on one GPU when the stage has trained, 2" in problem


def test_gpus_whose_memory_nobody_knows_are_not_judged():
    recipe = tiny_recipe(model={"from_scratch": SEVEN}, resources={"policy": {"gpus": 1}})
    nodes = [Node("node", {"CPU": 8.0, "GPU": 1.0}, None)]
    assert memory_problems(recipe, nodes, phases(recipe, nodes)) == []


# ---- vLLM's share, roles on CPUs, nodes in words


def test_the_share_of_a_gpu_that_vllm_asks_for():
    """16 GB of weights and 8 of cache on two GPUs of 80: 12 GB each and what the engine takes, never vLLM's own 92 %."""
    share = gpu_memory_utilization(weights=16e9, cache=8e9, tensor_parallel=2, gpu=80e9)
    assert share == pytest.approx((12e9 + VLLM_ELSE) / 80e9) and share < 0.2
    assert gpu_memory_utilization(weights=200e9, cache=0, tensor_parallel=1, gpu=80e9) == 0.95


def test_a_copy_on_the_host_is_read_by_other_processes_where_it_is():
    """Tied weights once; what the other process reads follows what this one writes, though only names and places travel."""
    model = torch.nn.ModuleDict({"one": torch.nn.Linear(3, 2), "two": torch.nn.Linear(3, 2, dtype=torch.bfloat16)})
    model["two"].bias = torch.nn.Parameter(torch.tensor([0.5, -2.0], dtype=torch.bfloat16))
    model["tied"] = model["one"]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    copy = HostCopy(model, pinned=False)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    weights = pickle.dumps(copy.named(untied(model)))
    assert len(weights) < 1000 and model["tied"].weight.data_ptr() == model["one"].weight.data_ptr()
    with torch.no_grad():
        model["one"].weight.fill_(0.25)
    read = "import pickle, sys; print({name: tensor.float().tolist() for name, tensor in pickle.load(sys.stdin.buffer)})"
    told = subprocess.run([sys.executable, "-c", read], input=weights, capture_output=True, check=True, timeout=120)
    found = ast.literal_eval(told.stdout.decode())
    assert found.keys() == {"one.weight", "one.bias", "two.weight", "two.bias"}
    assert found["one.weight"] == [[0.25] * 3] * 2 and found["two.bias"] == [0.5, -2.0]
    copy.close()


def test_the_copy_beside_an_engine_that_is_split_or_shares_its_gpu_stands_on_the_host():
    found = [str(copy_device("cuda", gpus, shares_gpu=shares)) for gpus, shares in ((1, False), (2, False), (1, True))]
    assert found == ["cuda", "cpu", "cpu"]
    assert copy_device("cpu", 2, shares_gpu=True) == torch.device("cpu")


def test_an_engine_that_shares_its_gpu_has_its_own_weights_there_once():
    """7 B in 16 bits: vLLM's own while it draws, none while others update; the plain copy is in the host's memory."""
    shares = {role: {"gpus": 0.2, "with": "policy"} for role in ("generation", "critic", "reward", "reference")}
    generation = {"engine": "vllm", "precision": "bfloat16", "stop": ()}
    recipe = tiny_recipe(model={"from_scratch": SEVEN}, generation=generation, resources={"policy": {"gpus": 0.2}} | shares)
    weights = 2 * shape_of_model(recipe).parameters
    drawing, updating, _ = phases(recipe, rented_nodes("1x1xH200"))
    process = drawing.processes["generation"]
    assert process.parts["copies"] == process.host["copy beside the engine"] == weights and "weights" not in process.parts
    there = [{share.process: share.size for share in phase.gpus[0, 0]}["generation 0"] for phase in (drawing, updating)]
    assert weights < there[0] < 1.5 * weights and there[1] == CONTEXT + VLLM_ELSE


def test_what_zero_3_gathers_has_two_bytes_per_weight_of_a_linear_layer():
    """A Llama of 1 block with tied embeddings: the block's matrices arrive in 16 bits, and are not cast again; embeddings arrive in
    float32, and their product is with a copy."""
    scratch = {"architecture": "llama", "layers": 1, "width": 64, "heads": 4, "positions": 64, "vocab_size": 1000}
    policy = {"gpus": 1, "actors": 2, "zero_stage": 3}
    recipe = tiny_recipe(model={"from_scratch": scratch}, resources={"policy": policy})
    parts = {row.role: row.process.parts for row in memory_plan(recipe)}["policy"]
    inner = 192  # 8/3 of the width, a multiple of 32
    linear, embeddings = 4 * 64 * 64 + 3 * 64 * inner, 1000 * 64
    assert parts["gathered"] == pytest.approx(2 * linear + 4 * embeddings, rel=0.01)  # norms: 3 x 64
    assert parts["16-bit copies"] == 2 * embeddings


def test_max_num_seqs_bounds_the_cache_and_not_the_chunk():
    sections = {"engine": "vllm", "chunk_size": 512, "stop": ()}
    rows = [tiny_recipe(generation=sections | more).generation.rows for more in ({}, {"max_num_seqs": 64}, {"max_num_seqs": 900})]
    assert rows == [512, 64, 512]
    sizes = [
        {row.role: row.process.parts for row in memory_plan(tiny_recipe(generation=sections | more))}["generation"]["cache"]
        for more in ({}, {"max_num_seqs": 64})
    ]
    assert sizes[0] / sizes[1] == pytest.approx(513 / 65)  # and a row more, in whole blocks


def test_no_role_is_left_on_cpus_in_silence():
    nodes = rented_nodes("1x8xH100")
    assert left_on_cpus(tiny_recipe(), []) == []
    assert left_on_cpus(tiny_recipe(), nodes) == [
        "there are 8 GPUs, and the recipe uses none: set resources.*.gpus and *.gpus_per_worker"
    ]
    told = left_on_cpus(tiny_recipe(resources={"policy": {"gpus": 1}, "critic": {"gpus": 1}, "generation": {"gpus": 1}}), nodes)
    assert [words.split(" is 0")[0] for words in told] == [
        "resources.reward.gpus", "resources.reference.gpus", "sft.gpus_per_worker", "reward.gpus_per_worker",
    ]  # fmt: skip
    by_function = {"reward_function": "user_scores:length", "critic_init": "sft"}
    one = tiny_recipe(ppo=by_function, reward=None, resources={"policy": {"gpus": 1}})
    assert not any("reward" in words for words in left_on_cpus(one, nodes))  # it has no model


def test_nodes_in_words():
    nodes = rented_nodes("2x8xH100")
    assert [node.name for node in nodes] == ["node 0", "node 1"]
    assert nodes[0].gpu_memory == (80 * 2**30,) * 8 and nodes[0].amounts["GPU"] == 8
    for words in ("8xH100", "0x8xH100", "1x8xH1000", "two"):
        with pytest.raises(UserError, match="NODESxGPUSxKIND"):
            rented_nodes(words)


def test_this_machine_has_what_the_system_says():
    with open("/proc/meminfo") as file:
        total = int(file.readline().split()[1]) * 1024
    assert 0 < local_memory() <= total
