"""DeepSpeed ranks that meet a number that is not finite: all stop, none moves, whatever the ZeRO stage."""

import math

import pytest
import torch
from ranks import clones, on_ranks
from small_engines import RATES, STAGES, loss_of, make_engine, microbatches

from rlhf_ray.errors import NotFinite, UserError


class BadGradient(torch.autograd.Function):
    """The value as it is, and a gradient that is not."""

    @staticmethod
    def forward(ctx, value, bad):
        ctx.bad = bad
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.bad, None


def infinite_loss(output, weights):
    """Infinite, with a gradient of 0 or more that is finite: the value loss does so beyond 1.8e19."""
    return loss_of(output, weights) + (output.detach().sum() * 0 + 3e38) * 3


def on_rank(rank, bad, fine=loss_of):
    """A loss that is bad on the last rank only, in its last microbatch."""
    calls = []

    def loss(output, weights):
        calls.append(1)
        return bad(output, weights) if rank == 0 and len(calls) == 2 else fine(output, weights)

    return loss


CASES = {
    "a loss of NaN": lambda output, weights: loss_of(output, weights) * math.nan,
    "an infinite loss with a finite gradient": infinite_loss,
    "a gradient of NaN under a finite loss": lambda output, weights: loss_of(BadGradient.apply(output, math.nan), weights),
    "an infinite gradient": lambda output, weights: loss_of(BadGradient.apply(output, math.inf), weights),
    "a norm that overflows": lambda output, weights: loss_of(BadGradient.apply(output, 1e30), weights),
}


def outcome(engine, loss, rank, world):
    before, steps = clones(engine.state()), engine.steps_taken
    try:
        engine.step(microbatches(rank, world), loss, learning_rate=RATES[0])
        said = "no error"
    except NotFinite as error:
        said = str(error)
    after = clones(engine.state())
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    return said, moved, engine.steps_taken - steps


def refusals(engine):
    """What `load_state` says of states that lack something; the engine stays as it is."""
    whole, said = clones(engine.state()), {}
    lacking = {
        "moments": {name: tensor for name, tensor in whole.items() if name.startswith("weight/")},
        "one moment": {name: tensor for name, tensor in whole.items() if name != "exp_avg_sq/2.bias"},
        "a weight": {name: tensor for name, tensor in whole.items() if name != "weight/0.weight"},
        "another shape": whole | {"exp_avg/0.bias": torch.zeros(9)},
        "everything": {},
    }
    for what, state in lacking.items():
        try:
            engine.load_state(state, 7, "the checkpoint step_000004 (policy)")
        except UserError as error:
            said[what] = str(error)
    assert engine.steps_taken == 1 and all(torch.equal(whole[name], tensor) for name, tensor in engine.state())
    return said


def fill_padding(engine, value):
    """Write what DeepSpeed leaves unwritten under ZeRO-3: what a rank's slices have past their parameters' ends."""
    padded = 0
    for _, parameter in engine.module.named_parameters():
        ours = parameter.ds_tensor.detach()
        end = max(0, parameter.ds_numel - engine.rank * ours.numel())
        ours[end:] = value
        padded += len(ours[end:])
    return padded


def work(rank, world):
    results = {}
    for stage in STAGES:
        for name, bad in CASES.items():
            engine = make_engine(stage)
            engine.step(microbatches(rank, world), loss_of, learning_rate=RATES[0])
            results[stage, name] = outcome(engine, on_rank(rank, bad), rank, world)
        engine = make_engine(stage)
        engine.step(microbatches(rank, world), loss_of, learning_rate=RATES[0])
        results[stage, "refusals"] = refusals(engine)
        if stage == 3:
            results[stage, "padding"] = fill_padding(engine, math.nan)
        engine.check_weights("fine")
        state = clones(engine.state())
        state["weight/2.weight"][0, 0] = math.nan  # in the slice of one rank
        engine.load_state(state, 1)
        try:
            engine.check_weights("nothing is sent")
        except NotFinite as error:
            results[stage, "weights"] = str(error)
    return results


@pytest.fixture(scope="module")
def results():
    return {world: on_ranks(work, world) for world in (2, 1)}


every = pytest.mark.parametrize("world, stage", [(world, stage) for world in (1, 2) for stage in STAGES])


@every
@pytest.mark.parametrize("case", CASES)
def test_no_rank_takes_the_step(results, world, stage, case):
    for rank in range(world):
        said, moved, steps = results[world][rank][stage, case]
        if stage == 3 and case == "a norm that overflows":
            continue  # ZeRO-3 computes its norm in 64 bits, where it is finite: the step is clipped and taken
        assert "the loss" in said or "the norm of the gradient" in said, said
        assert moved == [] and steps == 0, "weights and moments are those of the step before"


@every
def test_weights_are_looked_at_before_they_are_sent(results, world, stage):
    told = [results[world][rank][stage, "weights"] for rank in range(world)]
    assert all(each.startswith("nothing is sent: ") for each in told)
    assert any("2.weight holds values that are not finite" in each for each in told)


def test_memory_past_a_parameters_end_is_no_weight(results):
    # 0.bias has 7 values in slices of 4, and so on: `work` went on although each place past an end was NaN.
    assert results[2][1][3, "padding"] > 0 and results[1][0][3, "padding"] == 0


@every
def test_a_state_that_lacks_something_is_refused_in_words(results, world, stage):
    for rank in range(world):
        said = results[world][rank][stage, "refusals"]
        assert set(said) == {"moments", "one moment", "a weight", "another shape", "everything"}
        assert all(each.startswith("the checkpoint step_000004 (policy) has ") and "delete it" in each for each in said.values())
        assert "no optimiser moments (exp_avg) for 6 of 6 trained weights (0.weight" in said["moments"]
        assert "no optimiser moments (exp_avg_sq) for 1 of 6 trained weights (2.bias" in said["one moment"]
        assert "no weights for 1 of 6 trained weights (0.weight" in said["a weight"]
        assert "shape (9,) for 0.bias, whose own is (7,)" in said["another shape"]
