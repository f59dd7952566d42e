"""The loop of PPO with the real roles in one process: what may not change a run, and what it draws."""

import copy
import shutil
import uuid

import pytest
import torch
from checkpoints import write_rank
from differences import saw
from in_process import LocalRoles
from loops import (
    Diary,
    differing,
    loop_folder,  # noqa: F401 - fixtures
    real_loop,
    run_real,
)
from tiny import TEXTS, tiny_recipe

from rlhf_ray.ppo import checkpoint
from rlhf_ray.ppo.gates import MismatchError
from rlhf_ray.ppo.loop import LoopState
from rlhf_ray.ppo.step import cut_chunks
from rlhf_ray.runs.remote import in_store
from rlhf_ray.runs.run_folder import COPIES, RunFolder, working_copy
from rlhf_ray.runs.sealed import new_folder


def test_the_first_minibatch_has_ratio_one_exactly_at_equal_padding(folder):
    """Chunk, microbatch and minibatch are one batch of the same rows, so old and new log-probs are the same numbers."""
    recipe = tiny_recipe(ppo={"steps": 2, "minibatch_size": 8, "microbatch_size": 8}, generation={"chunk_size": 8})
    _, diary = run_real(recipe, folder)
    for _, metrics in diary.records[1:]:
        assert metrics["first_policy/ratio"] == 1.0
        assert metrics["first_policy/approx_kl"] == 0.0
        assert metrics["first_policy/clip_frac"] == metrics["first_value/clip_frac"] == 0.0
        assert metrics["policy/approx_kl"] > 0.0  # the second epoch sees another policy


@pytest.mark.parametrize("options", [{}, {"microbatch_tokens": 60, "entropy_coef": 0.05}, {"critic_warmup_steps": 1}])
def test_a_first_step_from_the_forward_passes_that_are_there_is_the_same_step(folder, options):
    """Two chunks of four in microbatches of two: equal weights, as many forward passes fewer, and no approx_kl at all."""
    ends, passes = [], []
    for reuse in (False, True):
        ppo = {"steps": 2, "minibatch_size": 8, "reuse_forward": reuse} | options
        recipe = tiny_recipe(ppo=ppo)
        roles, diary = LocalRoles(recipe, folder), Diary()
        count = [0, 0]
        for number, role in enumerate((roles.policy, roles.critic)):
            role.roles[0].engine.module.register_forward_hook(
                lambda *_, number=number, count=count: count.__setitem__(number, count[number] + 1)
            )
        assert real_loop(recipe, roles, diary).run()
        ends.append([dict(role.roles[0].engine.weights()) for role in (roles.policy, roles.critic)])
        passes.append(count)
        if reuse:
            assert all(metrics.get("first_policy/approx_kl", 0.0) == 0.0 for _, metrics in diary.records[1:])
    for one, other in zip(*ends, strict=True):
        for name, tensor in one.items():
            torch.testing.assert_close(
                other[name], tensor, atol=2e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
            )
    if not options:  # 2 steps of 4 microbatches: once for the old ones and once each epoch
        assert passes == [[2 * 4 * 3] * 2, [2 * 4 * 2] * 2]
    assert passes[1][0] < passes[0][0] and passes[1][1] < passes[0][1]


def test_the_first_minibatch_has_ratio_one_to_rounding_at_unequal_padding(folder):
    _, diary = run_real(tiny_recipe(ppo={"steps": 2}), folder)
    lengths = {metrics["objective/response_length"] for _, metrics in diary.records[1:]}
    assert not any(length.is_integer() for length in lengths), "responses of one length would prove nothing"
    for step, metrics in diary.records[1:]:
        assert metrics["first_policy/ratio"] == pytest.approx(1.0, abs=1e-5)
        assert abs(metrics["first_policy/approx_kl"]) < 1e-6
        assert metrics["policy/mismatch_max"] < 1e-5, "generator and policy agree, also after the sync"
        assert metrics["rollout/policy_version_min"] == step - 1


def test_at_a_lower_temperature_generator_policy_and_reference_agree(folder):
    _, diary = run_real(tiny_recipe(ppo={"steps": 2}, generation={"temperature": 0.6}), folder)
    first, second = (metrics for _, metrics in diary.records[1:])
    assert max(first["policy/mismatch_max"], second["policy/mismatch_max"]) < 1e-5
    assert first["objective/kl"] == pytest.approx(0.0, abs=1e-4), "the policy starts at the reference"
    assert second["objective/kl"] != pytest.approx(0.0, abs=1e-4)


TWO_STEPS = {"steps": 2}


@pytest.fixture(scope="module")
def undisturbed(folder):
    roles, diary = run_real(tiny_recipe(ppo=TWO_STEPS), folder)
    return roles.weights(), diary


def test_training_moves_both_models(folder, undisturbed):
    start = LocalRoles(tiny_recipe(ppo=TWO_STEPS), folder).weights()
    assert len(differing(start, undisturbed[0])) == len(start)


def test_it_does_not_matter_which_actor_a_chunk_goes_to(folder, undisturbed):
    roles, diary = run_real(tiny_recipe(ppo=TWO_STEPS), folder, actors=3)
    assert differing(roles.weights(), undisturbed[0]) == []
    saw("weights: 3 generation, reward and reference actors for 1", 0.0)
    scores = [[metrics["objective/score"] for _, metrics in each.records[1:]] for each in (diary, undisturbed[1])]
    assert scores[0] == scores[1]


def test_evaluating_does_not_disturb_training(folder, undisturbed):
    roles, _ = run_real(tiny_recipe(ppo=TWO_STEPS | {"eval_every": 1}), folder)
    assert differing(roles.weights(), undisturbed[0]) == []


def test_evaluation_draws_the_same_responses_from_the_same_policy(folder):
    roles = LocalRoles(tiny_recipe(), folder)
    drawn = []
    for step in (0, 3):
        rollouts = roles.generation.generate(cut_chunks(step, range(6), 1, 4, evaluation=True))
        drawn.append([ids.tolist() for rollout in rollouts for ids in rollout.sequences.responses()])
    training = roles.generation.generate(cut_chunks(0, range(6), 1, 4))
    assert drawn[0] == drawn[1]
    assert drawn[0] != [ids.tolist() for rollout in training for ids in rollout.sequences.responses()]


def test_evaluation_asks_the_held_out_prompts(folder):
    roles = LocalRoles(tiny_recipe(), folder)
    for evaluation, expected in ((False, TEXTS[2:5]), (True, TEXTS[18:21])):
        (rollout,) = roles.generation.generate(cut_chunks(0, [2, 3, 4], 1, 4, evaluation=evaluation))
        assert [prompt for prompt, _ in roles.reward.texts(rollout, 3)] == expected


def test_samples_of_a_prompt_differ(folder):
    roles = LocalRoles(tiny_recipe(), folder)
    (rollout,) = roles.generation.generate(cut_chunks(0, [3], 4, 4))
    assert len({tuple(ids) for ids in rollout.sequences.responses()}) > 1
    assert len({tuple(ids) for ids in rollout.sequences.prompts()}) == 1


def test_a_resumed_run_ends_in_the_same_weights(folder, undisturbed):
    """What a checkpoint holds (weights, optimiser, the controller's state) is all there is: the rest is made anew."""
    recipe = tiny_recipe(ppo=TWO_STEPS)
    before, diary = LocalRoles(recipe, folder), Diary(stop_after=1)
    assert not real_loop(recipe, before, diary).run()
    after, rest = LocalRoles(recipe, folder), Diary()
    for old, new in zip(before.engines, after.engines, strict=True):
        new.module.load_state_dict(old.module.state_dict())
        new.optimizer.load_state_dict(copy.deepcopy(old.optimizer.state_dict()))
    assert real_loop(recipe, after, rest, diary.saves[-1]).run()
    assert differing(after.weights(), undisturbed[0]) == []
    assert diary.steps() + rest.steps() == undisturbed[1].steps()


ADAM = ("step", "exp_avg", "exp_avg_sq")


def write_checkpoint(checkpoints, roles, state):
    """As the PPO stage does, with one rank each."""
    temporary, digests = checkpoint.temporary_folder(checkpoints, state.step), {}
    new_folder(temporary)
    for role, engine in zip(("policy", "critic"), roles.engines, strict=True):
        share = {f"weight/{name}": each for name, each in engine.weights()}
        share |= {f"{part}/{name}": engine.optimizer.state[each][part] for name, each in engine.weights() for part in ADAM}
        digests |= write_rank(temporary, role, 0, 1, share.items(), state.step)
    checkpoint.publish(checkpoints, state.step, state.to_json(), 2, digests)


def read_checkpoint(folder, roles):
    """-> the loop's state; the roles get theirs."""
    for role, engine in zip(("policy", "critic"), roles.engines, strict=True):
        held, _ = checkpoint.read_role(folder, role)
        for name, each in engine.weights():
            each.data.copy_(held[f"weight/{name}"])
            engine.optimizer.state[each] = {part: held[f"{part}/{name}"] for part in ADAM}
    return LoopState.from_json(checkpoint.read_state(folder))


def test_a_run_whose_copy_is_deleted_goes_on_from_its_store_to_the_same_weights(folder, undisturbed, tmp_path, monkeypatch):
    monkeypatch.setenv(COPIES, str(tmp_path))
    url = f"memory:///{uuid.uuid4().hex}/run"
    run, recipe = RunFolder(working_copy(url), url), tiny_recipe(ppo=TWO_STEPS)
    with in_store(run, 60, every_s=0.05):
        before, diary = LocalRoles(recipe, folder), Diary(stop_after=1)
        assert not real_loop(recipe, before, diary).run()
        write_checkpoint(run.stage("ppo").checkpoints, before, diary.saves[-1])
    shutil.rmtree(run.path)
    with in_store(run, 60):
        after = LocalRoles(recipe, folder)
        state = read_checkpoint(checkpoint.last_good(run.stage("ppo").checkpoints, pytest.fail), after)
        assert state.step == 1
        assert real_loop(recipe, after, Diary(), state).run()
    assert differing(after.weights(), undisturbed[0]) == []


def test_a_generator_on_stale_weights_stops_the_run(folder):
    """Weights that got lost on the way must not go unnoticed."""
    recipe = tiny_recipe(ppo={"learning_rate": 3e-2, "max_mismatch": 1e-3})
    roles, diary = LocalRoles(recipe, folder), Diary()
    roles.generation.synced = False
    with pytest.raises(MismatchError):
        real_loop(recipe, roles, diary).run()
    assert diary.steps() == [0, 1]
