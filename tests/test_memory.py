"""The memory plan against arithmetic by hand, against what autograd keeps, and against what arrays take."""

import weakref

import numpy as np
import pytest
import torch
from crossed import crossed
from tiny import tiny_recipe
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_ray.actors import run_recipe
from rlhf_ray.algorithms.chunked_head import head_logprobs_and_entropy
from rlhf_ray.algorithms.sampling import truncate
from rlhf_ray.generation.kv_cache import slot_bytes
from rlhf_ray.generation.ragged_decoder import RaggedDecoder
from rlhf_ray.messages import Support
from rlhf_ray.models.activations import block_bytes, cast_bytes, kept_bytes
from rlhf_ray.models.generation_memory import cache_of, prefill_bytes
from rlhf_ray.models.held_weights import held_weights
from rlhf_ray.models.load import build_causal_lm, disable_dropout, fast_attention
from rlhf_ray.models.logit_memory import head_pieces
from rlhf_ray.models.memory import memory_plan, pass_tokens
from rlhf_ray.models.size import shape_of_model
from rlhf_ray.models.support_memory import support_store_bytes, support_tokens
from rlhf_ray.models.tokenizer import word_tokenizer
from rlhf_ray.training.forward import LogprobModel, token_batch


def test_weights_gradients_and_moments_by_hand():
    """Twelve blocks of width 1,000: 144.16 M weights in them, 11 M in the embeddings, 155.16 M in all; adapters of rank 10 have
    1.92 M: 10 x 16,000 per block.

    On a CPU the generator has its weights twice, in the order of products too.
    """
    scratch = {"layers": 12, "width": 1000, "heads": 10, "positions": 1000, "vocab_size": 10_000}

    def plan(**ppo):
        rows = memory_plan(tiny_recipe(model={"from_scratch": scratch}, ppo=ppo))
        return {row.role: round(row.state / 1e9, 3) for row in rows}

    assert plan() == {"generation": 1.241, "reward": 0.621, "reference": 0.621, "policy": 2.483, "critic": 2.483}
    # 155.16 M + 4 x 1.92 M; 155.16 M + 3 x 72.08 M; the generator's third is of linear layers alone, without 11 M embeddings
    adapters = plan(lora={"rank": 10}, critic_freeze_layers=6)
    assert adapters == {"generation": 1.818, "reward": 0.621, "policy": 0.651, "critic": 1.486}


def test_the_cache_of_generation_by_hand():
    """6 rows of 16 + 10 tokens, 2 blocks of width 32: 2 x 2 x 32 x 6 x 26 numbers; three times 6 rows of 300 logits; of the prompts
    a feed-forward's 128 channels twice, and four times the width."""
    recipe = tiny_recipe(generation={"chunk_size": 6})
    row = next(row for row in memory_plan(recipe) if row.role == "generation")
    assert row.work == 4 * (2 * 2 * 32 * 6 * 26) + 4 * 3 * 6 * 300 + 4 * 6 * 16 * (2 * 128 + 4 * 32)


def test_long_prompts_are_read_in_parts():
    """64 rows of 4,096 tokens: 256 at a time of each, of 4 x 32 and twice 128 numbers; on a CPU two scores of 2 heads for each of
    the 4,096 tokens that each of the 256 sees."""
    shape, sizes = shape_of_model(tiny_recipe()), {"rows": 64, "longest": 4096, "itemsize": 2}
    assert prefill_bytes(shape, on_gpu=True, **sizes) == 2 * 64 * 256 * (2 * 128 + 4 * 32)
    assert prefill_bytes(shape, on_gpu=False, **sizes) == 2 * 2 * 64 * 2 * 256 * 4096
    assert prefill_bytes(shape, on_gpu=True, rows=2**20, longest=9, itemsize=2) == 2 * 2**20 * (2 * 128 + 4 * 32)


def test_a_head_read_in_pieces_keeps_one_piece_of_logits():
    """2,000 rows of 40 response tokens and 300 logits. On a CPU a piece has 2**18 // 300 rows."""
    rows = dict.fromkeys(("rollout_batch_size", "minibatch_size", "microbatch_size"), 2000)
    recipes = [tiny_recipe(generation={"max_new_tokens": 40}, ppo=rows | {"entropy_coef": coef}) for coef in (0.0, 0.01)]
    plain, pieces = (next(row for row in memory_plan(recipe) if row.role == "policy") for recipe in recipes)
    assert plain.process.parts["logits"] == pytest.approx(2 * 2000 * 40 * 300 * 4)
    assert pieces.process.parts["logits"] == (2**18 // 300) * 300 * (2 * 4 + 8) + 4 * 300 * 32


@pytest.mark.parametrize("cut, most", [
    ({"top_k": 7}, 7), ({"top_k": 1000}, 300), ({"top_p": 0.5}, 150), ({"top_p": 0.501}, 151), ({"min_p": 0.4}, 300),
    ({"top_k": 40, "top_p": 0.2}, 8), ({}, 0),
])  # fmt: skip
def test_the_most_that_truncated_sampling_keeps(cut, most):
    """300 tokens that are as good as equally likely: their logits differ in the sixth digit."""
    assert support_tokens(tiny_recipe(generation=cut)) == most
    if cut:
        logits = torch.randperm(300, generator=torch.Generator().manual_seed(0)).double()[None] * 1e-8
        assert int((truncate(logits.log_softmax(-1), **cut) > -torch.inf).sum()) == most


class LiveBytes(TorchDispatchMode):
    """Notes the most bytes that tensors made inside have at any one time."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for one in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(one, torch.Tensor) and one.untyped_storage().data_ptr() not in self.known:
                storage = one.untyped_storage()
                self.known.add(storage.data_ptr())
                weakref.finalize(storage, self.gone, storage.data_ptr(), storage.nbytes())
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
        return made

    def gone(self, place, size):
        self.known.discard(place)
        self.now -= size


@pytest.mark.parametrize("itemsize, dtype", [(4, torch.float32), (2, torch.bfloat16)])
def test_a_head_read_in_pieces_takes_what_the_plan_says(itemsize, dtype):
    """The bytes of all tensors of a forward and backward pass at their most, beside the weight's own gradient, which the plan has
    among the buckets, and the states' and the weight's copies in 16 bits, which it has elsewhere."""
    scratch = {"vocab_size": 3000, "width": 64, "heads": 2}
    rows = dict.fromkeys(("rollout_batch_size", "minibatch_size", "microbatch_size"), 64)
    recipe = tiny_recipe(model={"from_scratch": scratch}, generation={"max_new_tokens": 40}, ppo=rows)
    states, weight = (torch.randn(rows, 64, requires_grad=True) for rows in (64 * 40, 3000))
    ids = torch.zeros(64 * 40, dtype=torch.int64)
    with LiveBytes() as live:
        both = head_logprobs_and_entropy(states, weight, ids, temperature=0.7, compute_dtype=dtype)
        (both[0].sum() + both[1].sum()).backward()
    elsewhere = weight.nbytes + states.nbytes + (states.nbytes // 2 + weight.nbytes // 2 if itemsize == 2 else 0)
    tokens = pass_tokens(recipe, ranks=1)
    assert head_pieces(recipe, tokens=tokens, itemsize=itemsize, on_gpu=False) == pytest.approx(live.most - elsewhere, rel=0.15)


def test_a_cache_has_the_bytes_that_are_planned():
    """Eight rows of 32 slots; and never more slots than `--max-cache-tokens` allows, each of which has `slot_bytes`."""
    recipe = tiny_recipe()
    decoder = RaggedDecoder(build_causal_lm(recipe.model, word_tokenizer(300), 0))
    cache = decoder.new_cache(most=8 * 32)
    cache.reserve(8, 32)
    with torch.inference_mode():
        decoder.prefill(cache, 0, [np.arange(5)] * 8)
    held = sum(states.nbytes for layer in cache.layers for states in (layer.keys, layer.values))
    assert held == cache_of(shape_of_model(recipe), rows=8, longest=32, itemsize=4) == 8 * 32 * slot_bytes(decoder.model)
    cache.reserve(5, 48)
    held = sum(states.nbytes for layer in cache.layers for states in (layer.keys, layer.values))
    assert held <= 8 * 32 * slot_bytes(decoder.model)


def test_what_truncated_sampling_keeps_is_in_the_plan():
    """20 tokens kept by each of 8 x 10 response tokens: 4 bytes an id, 8 a token. In the store twice, in rollouts and in shards.

    A chunk has 4 rows, twice; a forward pass has 2 rows: places and ids of 8 bytes each, and a mask of 300 bytes per token.
    """
    plans = [{row.role: row.work for row in memory_plan(tiny_recipe(generation=cut))} for cut in ({}, {"top_k": 20})]
    more = {role: plans[1][role] - work for role, work in plans[0].items()}
    a_pass = 2 * 10 * (20 * 16 + 300)
    assert more == {
        "generation": 2 * 4 * 10 * (20 * 4 + 8),
        "reward": 0,
        "reference": a_pass,
        "policy": a_pass,
        "critic": 0,
    }
    a_step = 8 * 10 * (20 * 4 + 8)
    arrays = Support.of([np.arange(20)] * 80, np.zeros(80, np.float32))
    assert arrays.ids.nbytes + arrays.counts.nbytes + arrays.log_mass.nbytes == a_step
    for ppo, ranks, copies in (
        ({}, 1, 2), ({"steps_ahead": 2}, 1, 4), ({}, 2, 3), ({"ppo_epochs": 1}, 2, 2), ({"samples_per_prompt": 2}, 1, 4),
        ({"samples_per_prompt": 2, "rollout_batch_size": 4, "dynamic_sampling_rounds": 3}, 1, 6),
    ):  # fmt: skip
        recipe = tiny_recipe(generation={"top_k": 20}, ppo=ppo, resources={"policy": {"actors": ranks}})
        assert support_store_bytes(recipe, 20) == copies * a_step, ppo


def test_the_object_store_has_room_for_what_is_kept(monkeypatch):
    """As much as half of the shared memory holds: GPT-2 with 2 blocks of width 32 has 37,120 weights, and so has its critic. Two
    snapshots of both hold weights and two moments."""
    base, step = 512 * 2**20 + 12 * 37_120 + 2 * 12 * 2 * 37_120, 2 * 80 * (150 * 4 + 8)
    sizes = {}
    for free in (0, 2 * base + 2 * 1000, 10 * base):
        monkeypatch.setattr(run_recipe, "shared_memory_bytes", lambda free=free: free)
        sizes[free] = [run_recipe.object_store_bytes(tiny_recipe(generation={"top_p": top_p})) for top_p in (1.0, 0.5)]
    assert list(sizes.values()) == [[base, base], [base, base + 1000], [base, base + step]]


@crossed(
    "family, dtype, layers, vocabulary, checkpointing", ["gpt2", "llama", "qwen2"], [torch.float32, torch.bfloat16],
    [(2, 512, False), (4, 4096, False), (4, 512, True)],
)  # fmt: skip
def test_what_a_backward_pass_keeps(family, dtype, layers, vocabulary, checkpointing):
    """Within an eighth (with checkpoints, which keep little, a quarter) of the bytes that autograd holds on to after a forward pass
    of the longest rows, each storage once."""
    scratch = {
        "architecture": family,
        "layers": layers,
        "width": 128,
        "heads": 2,
        "positions": 64,
        "vocab_size": vocabulary,
    }
    recipe = tiny_recipe(
        model={"from_scratch": scratch}, data={"max_prompt_tokens": 24}, generation={"max_new_tokens": 40},
        ppo={"microbatch_size": 8, "minibatch_size": 8, "gradient_checkpointing": checkpointing},
    )  # fmt: skip
    model = fast_attention(build_causal_lm(recipe.model, word_tokenizer(vocabulary), 0), "cpu")
    disable_dropout(model)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    module = LogprobModel(model.train(), temperature=1.0, compute_dtype=dtype)
    random = np.random.default_rng(0)
    prompts, responses = (list(random.integers(0, vocabulary - 2, (8, tokens))) for tokens in (24, 40))
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(token_batch(prompts, responses, packed=module.packed))
    measured = sum(size for place, (size, _) in kept.items() if place not in own)
    shape, size = shape_of_model(recipe), {"tokens": 8 * 64, "longest": 64, "itemsize": dtype.itemsize}
    planned = kept_bytes(shape, **size, checkpointing=checkpointing) + 8 * 40 * vocabulary * dtype.itemsize
    held = held_weights(shape, recipe.model, lora=None, freeze_layers=0, language=True, itemsize=dtype.itemsize)
    planned += cast_bytes(held, itemsize=dtype.itemsize, checkpointing=checkpointing)
    if checkpointing:  # one block at a time is computed again in the backward pass, which has not run
        planned -= block_bytes(shape, **size, on_gpu=False)
        planned -= 2 * shape.blocks[0] if dtype.itemsize == 2 else 0
    assert planned == pytest.approx(measured, rel=0.25 if checkpointing else 0.125)
