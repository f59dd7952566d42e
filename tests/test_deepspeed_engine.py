"""The DeepSpeed engine at every ZeRO stage, on one rank and on two, against plain torch AdamW in one process."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from differences import saw
from ranks import clones, gap, on_ranks
from small_engines import (
    CLIP,
    CPU,
    INPUTS,
    RATES,
    ROWS,
    STAGES,
    WEIGHTS,
    loss_of,
    make_engine,
    make_module,
    microbatches,
)
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from rlhf_ray.actors.trainer_actors import TrainerActor
from rlhf_ray.ppo.checkpoint import read_role
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.training.deepspeed_engine import DeepSpeedEngine, Forwarded, OptimiserConfig
from rlhf_ray.training.forward import LogprobModel, token_batch

STEPS = 5
TF_EPS = 1e-3  # large, so that where it stands is felt


def plain_torch(clip=CLIP):
    """(weights after each step, gradient norms) of the whole batch in one process."""
    module = make_module()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0, eps=1e-5, weight_decay=0)
    states, norms = [], []
    for rate in RATES:
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss_of(module(INPUTS), WEIGHTS).backward()
        norms.append(float(nn.utils.clip_grad_norm_(module.parameters(), clip or float("inf"))))
        optimizer.step()
        states.append({name: tensor.detach().clone() for name, tensor in module.named_parameters()})
    return states, norms


def tensorflow_adam():
    """Weights after each step of Adam as TensorFlow has it, from the formula at the end of section 2 of Kingma and Ba."""
    module = make_module()
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in module.parameters()]
    states = []
    for step, rate in enumerate(RATES, start=1):
        module.zero_grad()
        loss_of(module(INPUTS), WEIGHTS).backward()
        norm = sum(float((p.grad.double() ** 2).sum()) for p in module.parameters()) ** 0.5
        for parameter, (m, v) in zip(module.parameters(), moments, strict=True):
            gradient = parameter.grad * min(1.0, CLIP / norm)
            m.mul_(0.9).add_(0.1 * gradient)
            v.mul_(0.999).add_(0.001 * gradient**2)
            alpha = rate * (1 - 0.999**step) ** 0.5 / (1 - 0.9**step)
            parameter.data -= alpha * m / (v.sqrt() + TF_EPS)
        states.append({name: tensor.detach().clone() for name, tensor in module.named_parameters()})
    return states


def train(engine, rank, world, steps=STEPS, start=0):
    """(weights after each step, norms)."""
    states, norms = [], []
    for rate in RATES[start : start + steps]:
        norms.append(engine.step(microbatches(rank, world), loss_of, learning_rate=rate))
        states.append(clones(engine.weights()))
    return states, norms


def make_language_model(dtype):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=11, n_positions=16, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3,
                        activation_function="gelu_pytorch_tanh", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)  # fmt: skip
    return LogprobModel(GPT2LMHeadModel(config), temperature=1.0, compute_dtype=dtype)


TEXTS = [np.random.default_rng(row).integers(0, 11, 3 + row) for row in range(ROWS)]


def mean_logprob(output, _=None):
    return output.sum() / ROWS


def language_model_norms(stage, rank, world):
    """Gradient norms of four steps in bfloat16, each rank with its rows in two microbatches."""
    settings = OptimiserConfig(adam_eps=1e-3, max_grad_norm=1.0, zero_stage=stage)
    engine = DeepSpeedEngine(make_language_model(torch.bfloat16), settings, device=CPU)
    texts = TEXTS[rank::world]
    parts = [texts[:1], texts[1:]]
    batches = [token_batch([row[:2] for row in part], [row[2:] for row in part], packed=True) for part in parts]
    return [engine.step([((batch,), None) for batch in batches], mean_logprob, learning_rate=1e-3) for _ in range(4)]


def count_reductions(engine, rank, world):
    """Calls with which DeepSpeed copies a plain group's gradients into buckets, reduces them and copies them back."""
    found, reduce = [], engine.engine.buffered_allreduce_fallback
    engine.engine.buffered_allreduce_fallback = lambda **kwargs: (found.append(1), reduce(**kwargs))
    train(engine, rank, world, steps=2)
    return len(found)


def rank_of(engine, rank, world):
    """The actor around an engine, as far as checkpoints go."""
    actor = TrainerActor.__new__(TrainerActor)
    actor.role_name, actor.role = "policy", SimpleNamespace(engine=engine)
    actor.folder = RunFolder(Path("run"))  # on this host's disk
    actor.shares_gpu = False
    actor.build(rank, world)
    return actor


def work(rank, world, folder):
    """One rank: everything that this world size is asked, at each stage."""
    results = {}
    for stage in STAGES:
        result = results[stage] = {}
        engine = make_engine(stage)
        assert engine.forward(INPUTS).requires_grad is False
        fresh = clones(engine.state())
        result["states"], result["norms"] = train(engine, rank, world, steps=3)
        after_three = clones(engine.state())
        checkpoint = folder / f"world{world}-stage{stage}"
        checkpoint.mkdir(exist_ok=True)
        writer = rank_of(engine, rank, world)
        writer.save(checkpoint)
        last_two = train(engine, rank, world, steps=2, start=3)  # while it is written, in place
        result["files"] = writer.saved(True)
        result["states"] += last_two[0]
        result["norms"] += last_two[1]
        result["forward"] = engine.forward(INPUTS).clone()

        # Into the used engine, and into a new one.
        engine.load_state(after_three, 3)
        result["rolled_back"] = train(engine, rank, world, steps=2, start=3)[0][-1]
        torch.distributed.barrier()
        loaded, steps_taken = read_role(checkpoint, "policy")
        anew = make_engine(stage)
        anew.load_state(loaded, steps_taken)
        result["differing"] = [name for name, tensor in anew.state() if not torch.equal(tensor, after_three[name])]
        result["reloaded"] = train(anew, rank, world, steps=2, start=3)[0][-1]

        # A checkpoint from before the first step, into an engine that has taken some.
        start = anew
        start.load_state(fresh, 0)
        result["from_start"] = train(start, rank, world)[0][-1]
        result["reductions"] = count_reductions(make_engine(stage), rank, world)
        result["unclipped"] = train(make_engine(stage, clip=0.0), rank, world, steps=2)
        result["language_model"] = language_model_norms(stage, rank, world)
        result["tensorflow"] = train(make_engine(stage, adam_form="tensorflow", adam_eps=TF_EPS), rank, world)[0]
        if stage == 3:
            with pytest.raises(AssertionError, match="ZeRO-3"):
                engine.forward(INPUTS, keep_graph=True)
            result["sum"] = start.sum_over_ranks(1.5 + rank)
            continue
        kept = make_engine(stage)
        parts = [
            (Forwarded(kept.forward(*inputs, keep_graph=True)), rest) for inputs, rest in microbatches(rank, world)
        ]
        result["kept_norm"] = kept.step(parts, loss_of, learning_rate=RATES[0])
        result["kept"] = clones(kept.weights())
        result["sum"] = start.sum_over_ranks(1.5 + rank)

    if world == 1:
        for written in STAGES:
            loaded, steps_taken = read_role(folder / f"world2-stage{written}", "policy")
            for stage in STAGES:
                engine = make_engine(stage)
                engine.load_state(loaded, steps_taken)
                results[f"{written}->{stage}"] = train(engine, rank, world, steps=2, start=3)[0][-1]
    results["compiler"] = "torch._inductor.compile_fx" in sys.modules
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """results[world][rank][stage]; two ranks first, as one rank reads their checkpoints."""
    folder = tmp_path_factory.mktemp("deepspeed")
    return {world: on_ranks(work, world, folder) for world in (2, 1)}


@pytest.fixture(scope="module")
def expected():
    return plain_torch()


each = pytest.mark.parametrize("world, stage", [(world, stage) for world in (1, 2) for stage in STAGES])


def test_the_case_is_worth_its_name(expected):
    """Every gradient is clipped, and the weights move by far more than the tolerance."""
    states, norms = expected
    assert min(norms) > 2 * CLIP
    assert gap(states[0], states[-1]) > 0.01


@each
def test_weights_and_norms_are_those_of_plain_torch(results, expected, world, stage):
    states, norms = expected
    for rank in range(world):
        result = results[world][rank][stage]
        largest = max(gap(one, other) for one, other in zip(result["states"], states, strict=True))
        assert saw(f"weights after an update: {world} rank(s), ZeRO {stage}, against plain torch", largest) < 1e-6
        assert result["norms"] == pytest.approx(norms, rel=1e-5)


@each
def test_a_language_models_gradients_in_bfloat16_are_those_of_float32(results, world, stage):
    """Its layers add to their gradients themselves where there is no ZeRO, and its norms read weights that ZeRO-3 gathers."""
    module = make_language_model(torch.float32)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, eps=1e-3, weight_decay=0)
    batch = token_batch([row[:2] for row in TEXTS], [row[2:] for row in TEXTS], packed=True)
    norms = []
    for _ in range(4):
        optimizer.zero_grad()
        mean_logprob(module(batch)).backward()
        norms.append(float(nn.utils.clip_grad_norm_(module.parameters(), 1.0)))
        optimizer.step()
    for rank in range(world):
        assert results[world][rank][stage]["language_model"] == pytest.approx(norms, rel=0.02)


@each
def test_a_step_from_kept_forward_passes_is_the_same(results, expected, world, stage):
    """All microbatches went forward before the first went backward."""
    if stage == 3:
        assert "kept" not in results[world][0][stage]  # refused: its gradients come out wrong
        return
    states, norms = expected
    for rank in range(world):
        assert gap(results[world][rank][stage]["kept"], states[0]) < 1e-6
        assert results[world][rank][stage]["kept_norm"] == pytest.approx(norms[0], rel=1e-5)


@each
def test_forward_sees_the_new_weights(results, expected, world, stage):
    module = make_module()
    module.load_state_dict(expected[0][-1])
    torch.testing.assert_close(results[world][0][stage]["forward"], module(INPUTS).detach(), atol=1e-5, rtol=0)


@each
def test_ranks_agree_bit_for_bit(results, world, stage):
    for result in results[world][1:]:
        assert gap(result[stage]["states"][-1], results[world][0][stage]["states"][-1]) == 0.0


@each
@pytest.mark.parametrize("way", ["rolled_back", "reloaded"])
def test_a_loaded_state_goes_on_bit_for_bit(results, world, stage, way):
    for result in results[world]:
        assert result[stage]["differing"] == []
        assert [len(digest) for digest in result[stage]["files"].values()] == [64]
        assert (
            saw("weights: checkpoint loaded and gone on", gap(result[stage][way], result[stage]["states"][-1])) == 0.0
        )


@each
def test_a_state_from_before_the_first_step_loads(results, world, stage):
    for result in results[world]:
        assert gap(result[stage]["from_start"], result[stage]["states"][-1]) == 0.0


def test_no_rank_waits_for_torchs_compiler(results):
    """DeepSpeed's ZeRO stages import an optimiser that asks for it."""
    assert not any(rank["compiler"] for world in results.values() for rank in world)


def test_one_rank_reduces_nothing_and_two_once_a_step(results):
    assert [results[world][0][0]["reductions"] for world in (1, 2)] == [0, 2]


@each
def test_no_limit_means_no_clipping(results, world, stage):
    states, norms = plain_torch(clip=0.0)
    found_states, found_norms = results[world][0][stage]["unclipped"]
    assert gap(found_states[1], states[1]) < 1e-6
    assert found_norms == pytest.approx(norms[:2], rel=1e-5)


@each
def test_adam_as_tensorflow_has_it(results, expected, world, stage):
    wanted = tensorflow_adam()
    assert gap(wanted[0], expected[0][0]) > 0.001, "another update than torch's"
    found = results[world][0][stage]["tensorflow"]
    assert max(gap(one, other) for one, other in zip(found, wanted, strict=True)) < 1e-6


@pytest.mark.parametrize("world, expected_sum", [(1, 1.5), (2, 4.0)])
def test_a_sum_over_ranks_is_known_to_all(results, world, expected_sum):
    assert [result[stage]["sum"] for result in results[world] for stage in STAGES] == [expected_sum] * 4 * world


@pytest.mark.parametrize("written", STAGES)
@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_of_two_ranks_loads_on_one_at_any_stage(results, expected, written, stage):
    found = gap(results[1][0][f"{written}->{stage}"], expected[0][-1])
    assert saw("weights: two ranks' checkpoint, gone on by one at any ZeRO stage", found) < 1e-6


def offloaded(rank, world):
    """Weights after each of two steps, norms, and the weights of the second step taken again, by stage and what is offloaded."""
    found = {}
    for stage, options in OFFLOADS:
        engine = make_engine(stage, **dict.fromkeys(options, True))
        first, norms = train(engine, rank, world, steps=1)
        kept = clones(engine.state())
        second, _ = train(engine, rank, world, steps=1, start=1)
        engine.load_state(kept, 1)
        again, _ = train(engine, rank, world, steps=1, start=1)
        found[stage, options] = first + second, norms, again[0]
    return found


OFFLOADS = [(1, ("offload_optimizer",)), (2, ("offload_optimizer",)), (3, ("offload_optimizer", "offload_param"))]


def test_what_is_offloaded_trains_as_what_is_not():
    """On a CPU both stand in the same memory; what is tested is that DeepSpeed takes the options, steps and loads with them."""
    states, norms = plain_torch()
    for rank in on_ranks(offloaded, 2):
        for place, (weights, own_norms, again) in rank.items():
            assert max(gap(one, other) for one, other in zip(weights, states[:2], strict=True)) < 1e-6, place
            assert own_norms == pytest.approx(norms[:1], abs=1e-6), place
            assert gap(again, weights[-1]) == 0, place
