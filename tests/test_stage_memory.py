"""The supervised stages' memory plan: weights by hand, and a step's work against what a real process takes."""


import pytest
from tiny import tiny_recipe

from rlhf_ray.models.activations import kept_bytes
from rlhf_ray.models.memory import memory_plan
from rlhf_ray.models.size import parameters, shape_of_model
from rlhf_ray.models.stage_memory import LOGIT, PLAIN_LOGIT, stage_memory_plan

SCRATCH = {"layers": 2, "width": 32, "heads": 2, "positions": 64, "vocab_size": 300}
#: GPT-2 of that size: 2 blocks of 12 * 32**2 + 13 * 32, 364 embeddings of 32, a norm of 2 * 32
WEIGHTS = 2 * (12 * 32**2 + 13 * 32) + 364 * 32 + 64


def plan(itemsize=4, **sections):
    recipe = tiny_recipe(**sections)
    return {row.stage: row for row in stage_memory_plan(recipe, dict.fromkeys(recipe.trained, itemsize))}


def test_weights_gradients_and_moments_by_hand():
    rows = plan(dpo={}, judge={"freeze_layers": 1, "max_length": 64}, reward={"lora": {"rank": 4}})
    adapters = 4 * 2 * (128 + 64 + 160 + 160)
    trained = {"sft": WEIGHTS, "reward": adapters, "dpo": WEIGHTS, "judge": 12 * 32**2 + 13 * 32 + 64}
    copies = {"dpo": 2}  # the reference
    assert parameters(tiny_recipe()) == WEIGHTS
    assert {name: row.state for name, row in rows.items()} == {
        name: 4 * WEIGHTS * copies.get(name, 1) + 12 * count for name, count in trained.items()
    } | {"reward": 4 * WEIGHTS + 16 * adapters}


def test_zero_shares_the_moments_among_ranks():
    by_stage = {stage: plan(sft={"workers": 2, "microbatch_size": 16, "zero_stage": stage})["sft"].state for stage in (0, 2, 3)}
    assert by_stage == {0: 16 * WEIGHTS, 2: (4 + 6 + 2) * WEIGHTS, 3: 8 * WEIGHTS}


def test_a_batch_by_hand():
    """32 rows of 64 tokens, pairs twice; 300 logits per token where a language model trains."""
    rows, shape = plan(dpo={"microbatch_size": 32}), shape_of_model(tiny_recipe())
    kept = {count: kept_bytes(shape, tokens=count, longest=64, itemsize=4, checkpointing=False) for count in (2048, 4096)}
    embeddings = 4 * 364 * 32  # a gradient of theirs
    assert rows["sft"].work == kept[2048] + 2 * embeddings + 2048 * 300 * LOGIT
    assert rows["reward"].work == kept[4096] + embeddings
    assert rows["dpo"].work == kept[4096] + 2 * embeddings + 4096 * 300 * LOGIT
    assert plan(reward={"objective": "scores"})["reward"].work == kept[2048] + embeddings
    packed = plan(sft={"packing": True})["sft"].work
    assert packed - rows["sft"].work == 2048 * 300 * (PLAIN_LOGIT - LOGIT)


#: stage, packing, layers, width, vocabulary, rows of 128 tokens, bytes per number, and the peak of resident memory of two steps
#: over that of a process that has imported all, in MB: GPT-2, AdamW, one thread, torch 2.13 on a CPU with AVX-512
MEASURED = [
    ("sft", False, 2, 64, 16000, 4, 4, 141.9), ("sft", False, 2, 64, 16000, 4, 2, 144.3),
    ("sft", True, 2, 64, 16000, 4, 4, 230.2), ("sft", True, 2, 64, 16000, 4, 2, 234.2),
    ("sft", False, 4, 512, 16000, 4, 4, 682.1), ("sft", False, 4, 512, 16000, 4, 2, 617.9),
    ("reward", False, 4, 512, 8000, 4, 4, 431.8),
]  # fmt: skip


@pytest.mark.parametrize("stage, packing, layers, width, vocabulary, rows, itemsize, peak", MEASURED)
def test_the_plan_is_within_a_fifth_of_what_steps_took(stage, packing, layers, width, vocabulary, rows, itemsize, peak):
    scratch = {"layers": layers, "width": width, "heads": width // 64, "positions": 128, "vocab_size": vocabulary}
    section = {"microbatch_size": rows, "max_length": 128}
    section |= {"packing": packing} if stage == "sft" else {"objective": "scores"}
    row = plan(itemsize, model={"from_scratch": scratch}, **{stage: section})[stage]
    assert (row.state + row.work) / 1e6 == pytest.approx(peak, rel=0.2)


def test_frozen_models_are_held_in_16_bits_and_tied_embeddings_are_copied():
    plans = {itemsize: {row.role: row.process for row in memory_plan(tiny_recipe(), itemsize=itemsize)} for itemsize in (2, 4)}
    logits = 2 * 26 * 10 / 26 * 300  # two rows of 16 + 10 tokens, of which ten are the response's
    passing = 2 * 26 * (2 * 128 + 4 * 32)  # numbers of a feed-forward layer and the width
    linear = WEIGHTS - 364 * 32
    for role in ("reward", "reference"):
        assert plans[2][role].state == plans[4][role].state - 2 * linear
    assert plans[2]["reward"].work == plans[4]["reward"].work - 2 * passing
    assert plans[2]["reference"].work == pytest.approx(plans[4]["reference"].work + 2 * 300 * 32 - 2 * logits - 2 * passing)


def test_adapters_stand_on_a_base_of_16_bits_that_is_measured_in_32():
    """The base's two blocks and last norm take 2 bytes, embeddings 4, adapters 16. Afterwards a model of 4 bytes each is measured,
    with the logits of a microbatch as they are, in float32 and as log-probs."""
    row = plan(2, reward={"lora": {"rank": 4}}, sft={"microbatch_size": 16})["reward"]
    adapters, linear = 4 * 2 * (128 + 64 + 160 + 160), WEIGHTS - 364 * 32
    assert row.state == 4 * 364 * 32 + 2 * linear + 16 * adapters
    assert row.process.moments == {"model to be written": 4 * (adapters + WEIGHTS)}
    assert row.process.host["copy for a checkpoint"] == 12 * adapters
    sft = plan(2, sft={"microbatch_size": 16})["sft"].process
    logits = 16 * 64 * 300 * (2 + 8)
    assert sft.loading[1] >= 4 * WEIGHTS + 2 * 300 * 32 + logits
    assert sft.memory > sft.loading[1]  # the training took more


def test_dpo_is_measured_with_its_reference_beside_it():
    recipe = tiny_recipe(dpo={"microbatch_size": 8})
    dpo = next(row.process for row in stage_memory_plan(recipe, dict.fromkeys(recipe.trained, 4)) if row.stage == "dpo")
    logits = 8 * recipe.max_length_of("dpo") * 300 * (4 + 8)
    assert dpo.loading[1] == 2 * 4 * WEIGHTS + logits
