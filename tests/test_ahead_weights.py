"""Generation ahead of training: weights of older samples, and the real roles."""

import copy
import math

import numpy as np
import pytest
import torch
from in_process import LocalRoles
from loops import Diary, count_t, differing, options, real_loop, run_real
from tiny import tiny_recipe, write_start

from rlhf_ray.algorithms.off_policy import off_policy_stats, truncated_importance
from rlhf_ray.errors import UserError
from rlhf_ray.models.wire import pack_weights
from rlhf_ray.ppo.ahead import Ahead
from rlhf_ray.ppo.gates import MismatchError
from rlhf_ray.ppo.single_process import SingleProcessPPO
from rlhf_ray.ppo.step import ppo_step, sync_weights
from rlhf_ray.roles.policy_trainer import PolicyTrainer
from rlhf_ray.runs.run_folder import RunFolder

NAN = float("nan")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_start(tiny_recipe(), RunFolder(tmp_path_factory.mktemp("ahead")))


def floats(*rows):
    return torch.tensor(rows, dtype=torch.float64)


OLD = floats([-1.0, -1.0, -2.0], [-0.5, -1.0, NAN])
DRAWN = floats([-1.5, -3.0, -1.0], [-0.5, -1.25, 7.0])
MASK = torch.tensor([[True, True, True], [True, True, False]])


def test_truncated_importance_by_hand():
    """e^0.5, e^2 cut to 2, e^-1; 1, e^0.25; nothing in the padding."""
    weights = truncated_importance(OLD, DRAWN, MASK, cap=2.0)
    expected = [[math.exp(0.5), 2.0, math.exp(-1)], [1.0, math.exp(0.25), 0.0]]
    np.testing.assert_allclose(weights, expected, rtol=1e-12)
    assert truncated_importance(OLD, OLD, MASK, cap=1.0)[MASK].tolist() == [1.0] * 5
    assert torch.isnan(truncated_importance(OLD, DRAWN + NAN, MASK, cap=2.0)[MASK]).all(), "no number stays none"


def test_what_is_said_of_older_samples_by_hand():
    """Row 0 is two versions old, row 1 of the current one: its gaps alone, 0 and -0.25, are a mismatch."""
    weights, ages = truncated_importance(OLD, DRAWN, MASK, cap=2.0), torch.tensor([2, 0])
    stats = off_policy_stats(weights, OLD, DRAWN, ages, MASK, cap=2.0)
    assert stats == pytest.approx({
        "rollout/age_mean": 1.0, "rollout/age_max": 2.0, "rollout/importance_capped_frac": 0.2,
        "rollout/importance_mean": (math.exp(0.5) + 2 + math.exp(-1) + 1 + math.exp(0.25)) / 5,
        "rollout/off_policy_kl": (-0.5 - 2 + 1 + 0 - 0.25) / 5,
        "policy/mismatch_p99": 0.25, "policy/mismatch_max": 0.25, "policy/mismatch_kl": (math.exp(0.25) - 1.25) / 2,
    })  # fmt: skip
    assert not any("mismatch" in name for name in off_policy_stats(weights, OLD, DRAWN, ages + 1, MASK, cap=2.0))


def test_untruncated_weights_make_an_older_policys_samples_those_of_the_current_one():
    """Summed over a whole vocabulary in float64: E_drawn[w A grad log pi] is E_pi[A grad log pi]; the cap takes from it."""
    generator = torch.Generator().manual_seed(0)
    logits, older, advantages = torch.randn(3, 9, generator=generator, dtype=torch.float64)
    own, drawn = logits.log_softmax(0), older.log_softmax(0)
    weights = [truncated_importance(*(x[None] for x in (own, drawn, drawn < 1)), cap=cap)[0] for cap in (1e9, 1.0)]
    score = torch.eye(9, dtype=torch.float64) - own.exp()  # row a: the gradient of log pi(a) in the logits
    wanted, found, cut = (
        sum(p[a] * advantages[a] * score[a] for a in range(9))
        for p in (own.exp(), drawn.exp() * weights[0], drawn.exp() * weights[1])
    )
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12)
    np.testing.assert_allclose(drawn.exp() * weights[1], torch.minimum(own.exp(), drawn.exp()), rtol=0, atol=1e-12)
    assert float((cut - wanted).abs().max()) > 0.01


STEPS = 2


@pytest.fixture(scope="module")
def synchronous(folder):
    return run_real(tiny_recipe(ppo={"steps": STEPS}), folder)


def test_zero_steps_ahead_is_the_synchronous_loop_bit_for_bit(folder, synchronous):
    """Against its steps written out one after the other, without a controller."""
    recipe = tiny_recipe(ppo={"steps": STEPS, "steps_ahead": 0, "importance_cap": 1e-6})
    roles = LocalRoles(recipe, folder)
    loop = real_loop(recipe, roles, Diary())
    assert loop.ahead is None and roles.experience.config.importance_cap is None
    sync_weights(roles, 0)
    for step in range(STEPS):
        rate = 1e-3 * (1 - step / STEPS)
        ppo_step(roles, loop._chunks(step), options(
            step=step, kl_coef=recipe.ppo.kl_coef, learning_rate=rate, critic_learning_rate=rate
        ))  # fmt: skip
    assert differing(roles.weights(), synchronous[0].weights()) == []
    assert not any(
        name.startswith(("rollout/importance", "rollout/age")) for _, row in synchronous[1].records for name in row
    )


def test_the_step_of_the_asynchronous_loop_is_that_of_the_synchronous_one(folder, synchronous):
    """Never ahead, it draws, trains and syncs the same; without a cap near it a sample of the policy's own weighs 1."""
    recipe = tiny_recipe(ppo={"steps": STEPS})
    roles = LocalRoles(recipe, folder)
    chunks = real_loop(recipe, roles, Diary())._chunks
    ahead = Ahead(roles, chunks, steps_ahead=0, steps=STEPS, in_flight=False)
    sync_weights(roles, 0)
    for step in range(STEPS):
        rate = 1e-3 * (1 - step / STEPS)
        ahead.step(options(step=step, kl_coef=recipe.ppo.kl_coef, learning_rate=rate, critic_learning_rate=rate))
    assert differing(roles.weights(), synchronous[0].weights()) == []


def test_samples_of_another_precision_are_weighed_if_the_recipe_says_so(folder):
    """The generator computes in bfloat16, the policy in float32: same weights, other log-probs."""
    rows, weights = {}, {}
    for corrects in (False, True):
        ppo = {"steps": 1, "importance_correction": corrects, "importance_cap": 1.0001}
        roles, diary = run_real(tiny_recipe(ppo=ppo, generation={"precision": "bfloat16"}), folder)
        rows[corrects], weights[corrects] = diary.records[1][1], roles.weights()
    assert not any(name.startswith("rollout/importance") for name in rows[False])
    corrected = rows[True]
    assert corrected["policy/mismatch_max"] == rows[False]["policy/mismatch_max"] > 1e-4, (
        "measured and gated either way"
    )
    assert corrected["rollout/age_max"] == 0 and corrected["first_policy/ratio"] == pytest.approx(1.0, abs=1e-5)
    assert 0.99 < corrected["rollout/importance_mean"] < 1.0001
    assert 0.0 < corrected["rollout/importance_capped_frac"] < 1.0
    assert differing(weights[True], weights[False]), "the weights of the tokens reach the update"


def test_older_samples_are_weighed_and_the_first_ratio_is_still_one(folder, synchronous):
    recipe = tiny_recipe(ppo={"steps_ahead": 1, "learning_rate": 5e-3, "steps": 5, "importance_cap": 1.05})
    roles, diary = run_real(recipe, folder)
    rows = [metrics for _, metrics in diary.records[1:]]
    assert [row["rollout/age_max"] for row in rows] == [0, 1, 1, 1, 1] == [row["rollout/age_mean"] for row in rows]
    for row in rows:
        assert row["first_policy/ratio"] == pytest.approx(1.0, abs=1e-5)
        assert abs(row["first_policy/approx_kl"]) < 1e-6
        assert row["rollout/importance_mean"] <= 1.05
    assert rows[0]["rollout/importance_mean"] == pytest.approx(1.0, abs=1e-5)
    assert rows[0]["rollout/importance_capped_frac"] == 0.0
    assert all(row["rollout/importance_capped_frac"] > 0.05 for row in rows[1:]), "the policy moved in between"
    gaps = {step: row["policy/mismatch_max"] for step, row in diary.records if "policy/mismatch_max" in row}
    assert set(gaps) == {0, 1, 2, 4, 5} and max(gaps.values()) < 1e-5, "where both have the same weights"
    assert len(differing(roles.weights(), synchronous[0].weights())) == len(roles.weights())


def test_a_generator_on_other_weights_than_it_says_stops_the_run_at_the_next_evaluation(folder):
    recipe = tiny_recipe(ppo={"steps_ahead": 1, "max_mismatch": 1e-3, "learning_rate": 3e-2})
    roles, diary = LocalRoles(recipe, folder), Diary()
    load = roles.generation.load_weights

    def lose_them(weights, policy_version):
        for role in roles.generation.roles:
            role.policy_version = policy_version
        return load(weights, policy_version) if policy_version == 0 else [policy_version]

    roles.generation.load_weights = lose_them
    with pytest.raises(MismatchError, match="max_mismatch = 0.001"):
        real_loop(recipe, roles, diary).run()
    assert diary.steps() == [0, 1], "the evaluation after step 2"


def test_a_stopped_run_goes_on_with_all_prompts(folder):
    recipe = tiny_recipe(ppo={"steps_ahead": 2, "steps": 6})
    trained = []

    def watched():
        roles = LocalRoles(recipe, folder)
        assemble = roles.experience.assemble

        def spy(rollouts, *rest):
            trained.extend(
                (rollout.chunk.step, prompt) for rollout in rollouts for prompt in rollout.chunk.prompt_indices
            )
            return assemble(rollouts, *rest)

        roles.experience.assemble = spy
        return roles

    before, diary = watched(), Diary(stop_after=3)
    assert not real_loop(recipe, before, diary).run()
    after, rest = watched(), Diary()
    for old, new in zip(before.engines, after.engines, strict=True):
        new.module.load_state_dict(old.module.state_dict())
        new.optimizer.load_state_dict(copy.deepcopy(old.optimizer.state_dict()))
    assert real_loop(recipe, after, rest, diary.saves[-1]).run()
    assert diary.steps() + rest.steps() == list(range(7))
    for epoch in range(3):  # 16 prompts, 8 a step
        assert sorted(prompt for step, prompt in trained if step // 2 == epoch) == list(range(16))
    assert [row["rollout/age_max"] for _, row in rest.records] == [0, 1, 2]


def test_weights_in_flight_are_taken_before_the_next_chunk(folder):
    recipe = tiny_recipe()
    roles, other = LocalRoles(recipe, folder), LocalRoles(recipe, folder)
    (generator,), (straight,) = roles.generation.roles, other.generation.roles
    (chunk, *_) = real_loop(recipe, roles, Diary())._chunks(3)
    start = generator.generate(chunk)

    def moved(by):
        weights = ((name, tensor + by) for name, tensor in roles.policy.roles[0].weights())
        return {name: array for part in pack_weights(weights, 2, torch.float32) for name, array in part.items()}

    assert generator.update_weights_in_flight(moved(0.5), 1) == 1
    assert generator.policy_version == 0, "not while a chunk may be at work"
    generator.update_weights_in_flight(moved(0.02), 2)
    straight.load_weights(moved(0.02), 2)
    found, wanted = generator.generate(chunk), straight.generate(chunk)
    assert found.policy_version == wanted.policy_version == 2, "the newest, none between"
    assert np.array_equal(found.rollout_logprobs, wanted.rollout_logprobs)
    assert not np.array_equal(found.rollout_logprobs, start.rollout_logprobs)
    assert generator.generate(chunk).policy_version == 2


def test_an_update_starts_from_the_forward_passes_of_its_own_rollouts(folder, monkeypatch):
    """The gate asks the policy for log-probs of held-out responses too, three chunks of them where a step has two."""
    shape = {"steps": 3, "steps_ahead": 1, "eval_every": 1, "rollout_batch_size": 4}
    weights, reused = [], []
    kept = PolicyTrainer._kept_batches
    monkeypatch.setattr(PolicyTrainer, "_kept_batches", lambda *args: reused.append(1) or kept(*args))
    for reuse in (False, True):
        recipe = tiny_recipe(ppo=shape | {"reuse_forward": reuse}, generation={"chunk_size": 2})
        weights.append(run_real(recipe, folder)[0].weights())
    assert max(float((weights[0][name] - weights[1][name]).abs().max()) for name in weights[0]) < 1e-5
    assert len(reused) == 3


def test_the_one_file_loop_refuses(folder):
    with pytest.raises(UserError, match="does not act on ppo.steps_ahead = 2; set ppo.steps_ahead to 0"):
        SingleProcessPPO(tiny_recipe(ppo={"steps_ahead": 2}), folder)


@pytest.mark.parametrize("algorithm", [
    pytest.param({}, id="ppo"), pytest.param({"advantage": "grpo"}, id="grpo"),
])  # fmt: skip
@pytest.mark.thorough
def test_the_score_rises_ahead_too(folder, algorithm):
    recipe = tiny_recipe(
        generation={"stop": (), "chunk_size": 16},
        ppo={
            "steps": 25, "rollout_batch_size": 16, "samples_per_prompt": 2, "minibatch_size": 32, "microbatch_size": 32,
            "ppo_epochs": 3, "learning_rate": 5e-3, "critic_learning_rate": 5e-3, "kl_coef": 0.01, "missing_eos_penalty": 0,
            "eval_every": 25, "checkpoint_every": 100, "reward_function": "loops:count_t", "steps_ahead": 2,
            **algorithm,
        },
    )  # fmt: skip
    assert count_t([], ["tot"]) == [2]
    _, diary = run_real(recipe, folder)
    scores = [metrics["objective/score"] for _, metrics in diary.records[1:]]
    assert sum(scores[-5:]) / 5 > 4 * max(sum(scores[:5]) / 5, 0.1), scores
