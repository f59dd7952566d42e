"""What updates alone need leaves the device between them, at every ZeRO stage, and no bit of the training changes."""

import gc
import weakref
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from ranks import clones, on_ranks
from small_engines import RATES, STAGES, loss_of, make_engine, microbatches
from tiny import tiny_recipe

from rlhf_ray.actors.groups import TrainerGroup
from rlhf_ray.actors.trainer_actors import TrainerActor
from rlhf_ray.models.turns import updates_in_turn
from rlhf_ray.training.engine_state import ADAM_STATE


def moments_of(engine):
    return [moments[key] for moments in engine._state.adam().state.values() for key in ADAM_STATE]


def work(rank, world):
    """Per stage: weights and state of an engine that rests after every update and before it is saved, and of one that never does;
    how many of its moments, and bytes of ZeRO-3's buffers, were still there while it rested."""
    results = {}
    for stage in STAGES:
        plain, resting = make_engine(stage), make_engine(stage, rests=True)
        left, buffers, hosts = 0, [], set()
        for rate in RATES:
            for engine in (plain, resting):
                engine.step(microbatches(rank, world), loss_of, learning_rate=rate)
            on_device = [weakref.ref(tensor) for tensor in moments_of(resting)]
            resting.rest()
            gc.collect()
            left += sum(ref() is not None for ref in on_device)
            hosts.add(tuple(tensor.data_ptr() for tensor in moments_of(resting)))
            if stage == 3:
                buffers += [bucket.buffer for bucket in resting.optimizer.ipg_buckets.values()]
        resting.forward(microbatches(rank, world)[0][0][0])  # needs no moments
        rests = resting._resting.rests
        states = [clones(engine.state()) for engine in (plain, resting)]
        results[stage] = {
            "left": left, "places": len(hosts), "buffers": buffers, "rests": rests,
            "differing": [name for name, tensor in states[0].items() if not torch.equal(tensor, states[1][name])],
            "moved": float(states[1]["exp_avg/0.weight"].abs().max()),
        }  # fmt: skip
    return results


@pytest.fixture(scope="module")
def results():
    return on_ranks(work, 2)


@pytest.mark.thorough
@pytest.mark.parametrize("stage", STAGES)
def test_moments_leave_the_device_and_no_bit_changes(results, stage):
    for rank in results:
        found = rank[stage]
        assert found["differing"] == [] and found["moved"] > 0
        assert found["left"] == 0, "views of a moment keep its memory"
        assert found["places"] == 1, "the same memory of the host every time"
        assert found["buffers"] == ([] if stage < 3 else [None] * len(found["buffers"])) and found["rests"]


@pytest.mark.parametrize(
    "gpus, steps_ahead, rests", [(0.5, 0, True), (0.5, 1, False), (1.0, 0, False), (0.0, 0, False)]
)
def test_who_rests_follows_from_the_placement(gpus, steps_ahead, rests):
    actor = TrainerActor.__new__(TrainerActor)
    actor.shares_gpu = 0 < gpus < 1
    actor.recipe = SimpleNamespace(ppo=SimpleNamespace(steps_ahead=steps_ahead))
    called = []
    actor.role = SimpleNamespace(
        engine=SimpleNamespace(rest=lambda: called.append("rest")), update=lambda shard, rate: called.append("update")
    )
    actor.update(None, (1e-5,))
    assert called == ["update", "rest"] if rests else called == ["update"]


def test_the_critic_s_update_waits_for_the_policy_s_where_they_share_gpus():
    """The policy's results are arguments of the critic's calls, which Ray begins when all arguments are there; once per update."""

    class Member:
        role, name = "critic", "critic rank 0"
        calls: ClassVar[list] = []

        def call(self, method, *args, **options):
            self.calls.append(args)
            return [f"result {len(self.calls)}"]

    for turn in (True, False):
        Member.calls = []
        policy, critic = TrainerGroup([Member(), Member()]), TrainerGroup([Member()])
        critic.turn_after = policy if turn else None
        policy.update(["a", "b"], 0.1, 0.2)
        critic.update(["c"], 0.3)
        critic.update(["d"], 0.3)  # the policy is not trained in a critic's warm-up
        waits = ("result 1", "result 2") if turn else ()
        assert Member.calls == [("a", (0.1, 0.2)), ("b", (0.1, 0.2)), ("c", (0.3,), *waits), ("d", (0.3,))]


@pytest.mark.parametrize("share, ahead, in_turn", [(0.5, 0, True), (0.5, 1, False), (1, 0, False)])
def test_who_updates_in_turn_follows_from_the_placement(share, ahead, in_turn):
    roles = {"policy": {"gpus": share}, "critic": {"gpus": share} | ({"with": "policy"} if share < 1 else {})}
    assert updates_in_turn(tiny_recipe(resources=roles, ppo={"steps_ahead": ahead})) == in_turn
