"""One step of PPO with scripted roles: prompts, shards, the order of things."""

import math

import numpy as np
import pytest
import torch
from loops import Diary, ScriptedRoles, options, scripted_loop

from rlhf_ray.errors import UserError
from rlhf_ray.messages import Sequences
from rlhf_ray.ppo.gates import MismatchError
from rlhf_ray.ppo.step import cut_chunks, ppo_step, step_prompts, sum_over_ranks
from rlhf_ray.roles.experience_maker import policy_shards, rank_parts


def test_an_epoch_takes_each_prompt_at_most_once_and_the_next_is_in_another_order():
    steps = [step_prompts(step, prompts=12, batch=4, seed=5) for step in range(9)]
    epochs = [steps[i : i + 3] for i in (0, 3, 6)]
    for epoch in epochs:
        assert sorted(prompt for batch in epoch for prompt in batch) == list(range(12))
    assert epochs[0] != epochs[1] != epochs[2]
    assert step_prompts(0, 12, 4, seed=5) != step_prompts(0, 12, 4, seed=6)


def test_the_rest_of_an_epoch_is_left_out_and_no_prompt_is_forgotten_for_ever():
    steps = [step_prompts(step, prompts=10, batch=4, seed=0) for step in range(40)]
    for first, second in zip(steps[::2], steps[1::2], strict=True):
        assert len({*first, *second}) == 8
    assert {prompt for step in steps for prompt in step} == set(range(10))


def test_units_hold_every_sample_of_every_prompt_once_in_chunks():
    chunks = cut_chunks(5, [9, 4, 7], samples=2, chunk_size=4)
    assert [(chunk.prompt_indices, chunk.sample_indices) for chunk in chunks] == [
        ((9, 9, 4, 4), (0, 1, 0, 1)),
        ((7, 7), (0, 1)),
    ]
    assert [(chunk.step, chunk.index, chunk.evaluation) for chunk in chunks] == [(5, 0, False), (5, 1, False)]


def test_a_step_rolls_out_assembles_updates_and_syncs():
    roles = ScriptedRoles()
    ppo_step(roles, cut_chunks(4, range(6), 1, 3), options())
    assert roles.verbs() == [
        "generate",
        "score",
        "logprobs",
        "logprobs",
        "values",
        "assemble",
        "update",
        "update",
        "weights",
        "load_weights",
    ]
    assert roles.events[5:] == [
        ("assemble", 0.1),
        ("update", "policy shard", 0.5),
        ("update", "critic shard", 0.25),
        ("weights",),
        ("load_weights", 5),
    ]


def test_a_step_drops_no_handle():
    """A failed call whose handle nobody waits for would be a silent loss: a lost load_weights means stale rollouts."""
    roles = ScriptedRoles()
    ppo_step(roles, cut_chunks(4, range(6), 1, 3), options())
    assert {id(handle) for handle in roles.handles} == {id(handle) for handle in roles.waited}


def test_a_run_drops_no_handle():
    """Evaluations too: what is never waited for is never released either."""
    roles = ScriptedRoles()
    scripted_loop(roles, Diary()).run()
    assert {id(handle) for handle in roles.handles} == {id(handle) for handle in roles.waited}


def test_causes_are_waited_for_before_what_needs_them():
    """A dead reward model takes the experience actor's call along; the failure that is told must be the reward model's."""
    needs = {
        "score": {"generate"},
        "logprobs": {"generate"},
        "values": {"generate"},
        "load_weights": {"weights"},
        "assemble": {"score", "logprobs", "values"},
        "evaluate": {"score", "logprobs"},
    }
    roles = ScriptedRoles()
    scripted_loop(roles, Diary(), steps=1, eval_every=1).run()
    block = {}
    for number, handles in enumerate(roles.waits):
        for handle in handles:
            block.setdefault(id(handle), number)
    for place, handle in enumerate(roles.handles):
        causes = [cause for cause in roles.handles[:place] if cause.verb in needs.get(handle.verb, ())]
        assert all(block[id(cause)] < block[id(handle)] for cause in causes), handle.verb


@pytest.mark.parametrize(
    "verb", ["generate", "score", "logprobs", "values", "assemble", "update", "weights", "load_weights"]
)
def test_a_failure_of_any_verb_ends_the_step(verb):
    with pytest.raises(UserError, match=f"{verb} failed"):
        ppo_step(ScriptedRoles(broken=verb), cut_chunks(4, range(6), 1, 3), options())


@pytest.mark.parametrize("figure, limit", [("mismatch", "max_mismatch = 0.5"), ("mismatch_kl", "max_mismatch_kl = 0.01")])
@pytest.mark.parametrize("value", [0.51, math.inf, math.nan])
def test_the_mismatch_gate_stands_before_the_update(figure, limit, value):
    roles = ScriptedRoles(**{figure: value})
    with pytest.raises(MismatchError, match=limit):
        ppo_step(roles, cut_chunks(4, range(6), 1, 3), options())
    assert roles.verbs()[-1] == "assemble"


def test_statistics_add_up_over_ranks_but_for_the_gradient_norm():
    parts = [{"policy/loss": 1.0, "policy/grad_norm": 3.0}, {"policy/loss": 2.0, "policy/grad_norm": 3.0}]
    assert sum_over_ranks(parts) == {"policy/loss": 3.0, "policy/grad_norm": 3.0}


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_ranks_together_hold_each_row_of_each_minibatch_once(ranks):
    """Row b is b + 1 tokens long, and everything about it says b: what a rank would train on shows whose it is."""
    rows, schedule = 8, [[0, 3, 5, 6], [1, 2, 4, 7], [0, 1, 2, 3], [4, 5, 6, 7]]
    ids = [np.full(b + 1, b, np.int32) for b in range(rows)]
    floats = torch.arange(rows, dtype=torch.float32)[:, None].expand(rows, rows)
    shards = policy_shards(
        3, rank_parts(Sequences.of(ids, ids), schedule, ranks), floats + 0.25, floats + 0.5, None
    )
    assert len(shards) == ranks and all(shard.step == 3 for shard in shards)
    found = [[] for _ in schedule]
    for shard in shards:
        responses, lengths = shard.sequences.responses(), shard.sequences.response_lengths
        parts = zip(
            responses,
            shard.sequences.prompts(),
            np.split(shard.old_logprobs, np.cumsum(lengths)[:-1]),
            np.split(shard.advantages, np.cumsum(lengths)[:-1]),
            strict=True,
        )
        whose = []
        for response, prompt, old, target in parts:
            b = int(response[0])
            assert len(response) == len(prompt) == len(old) == len(target) == b + 1
            assert (prompt == b).all() and (old == b + 0.25).all() and (target == b + 0.5).all()
            whose.append(b)
        assert len(set(whose)) == len(whose), "a shard holds a row once, however often it is trained on"
        for number, step in enumerate(shard.schedule):
            assert len(step.rows) == 4 // ranks
            assert step.num_tokens == sum(b + 1 for b in schedule[number]), "of all ranks"
            found[number] += [whose[row] for row in step.rows]
    assert [sorted(rows) for rows in found] == schedule
