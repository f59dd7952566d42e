"""The loop of PPO with the real roles in one process: algorithms, warm-up, several rewards; and that the score rises."""

import numpy as np
import pytest
from in_process import LocalRoles
from loops import (
    Diary,
    count_t,
    differing,
    loop_folder,  # noqa: F401 - fixtures
    real_loop,
    run_real,
    words,
)
from tiny import tiny_recipe

from rlhf_ray.messages import Scores
from rlhf_ray.ppo.gates import MismatchError
from rlhf_ray.ppo.step import cut_chunks, step_prompts

CRITIC_FREE = {
    "rloo": {},
    "grpo": {"kl_in": "loss", "kl_estimator": "k3", "loss_aggregation": "sequence_mean"},
    "dr_grpo": {"loss_aggregation": "constant", "clip_range_high": 0.28, "dual_clip": 3.0},
    "reinforce_pp": {"entropy_coef": 0.01, "loss_aggregation": "sequence_sum"},
    "reinforce_pp_baseline": {"kl_in": "loss", "kl_estimator": "k2", "max_approx_kl": 0.05},
}


@pytest.mark.parametrize("advantage", CRITIC_FREE)
def test_an_algorithm_without_a_critic_runs_without_one(folder, advantage):
    recipe = tiny_recipe(ppo={
        "steps": 2, "rollout_batch_size": 4, "samples_per_prompt": 2, "minibatch_size": 8, "microbatch_size": 8,
        "advantage": advantage, **CRITIC_FREE[advantage],
    }, generation={"chunk_size": 8})  # fmt: skip
    start = LocalRoles(recipe, folder).weights()
    roles, diary = run_real(recipe, folder)
    assert roles.critic is None and "critic" not in recipe.ppo_roles
    assert len(differing(start, roles.weights())) == len(start)
    for _, metrics in diary.records[1:]:
        assert metrics["first_policy/ratio"] == 1.0 and metrics["first_policy/approx_kl"] == 0.0
        assert not any(name.startswith("value/") for name in metrics)
        assert ("policy/kl_loss" in metrics) == (recipe.ppo.kl_in == "loss")


def test_prompts_that_tell_nothing_make_room_for_others(folder):
    """Rounds of just what is missing: every group that serves is trained on, and the batch keeps its size."""
    shape = {
        "steps": 1, "rollout_batch_size": 6, "samples_per_prompt": 2, "minibatch_size": 12, "microbatch_size": 12,
        "advantage": "grpo", "reward_function": "loops:count_a_few", "missing_eos_penalty": 0.0,
    }  # fmt: skip
    once = tiny_recipe(ppo=shape)
    roles = LocalRoles(once, folder)
    prompts = step_prompts(0, 16, 6, once.seed)
    (scores,) = roles.reward.score(roles.generation.generate(cut_chunks(0, prompts, 2, 12)))
    pairs = scores.total.reshape(6, 2)
    telling = [prompt for prompt, (one, other) in zip(prompts, pairs, strict=True) if one != other]
    assert 0 < len(telling) < 5, "the case needs some prompts that tell and some that don't"

    seen = []
    for rounds in (1, 20):
        recipe = tiny_recipe(ppo=shape | {"dynamic_sampling_rounds": rounds})
        roles, diary = LocalRoles(recipe, folder), Diary()
        assemble = roles.experience.assemble

        def spy(rollouts, scores, *rest, assemble=assemble):
            seen.append(([chunk.chunk.prompt_indices for chunk in rollouts], Scores.join(scores).total.reshape(6, 2)))
            return assemble(rollouts, scores, *rest)

        roles.experience.assemble = spy
        real_loop(recipe, roles, diary).run()
        chunks, scores = seen[-1]
        places = [prompt for chunk in chunks for prompt in chunk]
        assert [len(chunk) for chunk in chunks] == [4, 4, 4]
        trained = places[::2]
        assert trained == places[1::2] and len(set(trained)) == 6, "both samples of six different prompts"
        assert set(telling) <= set(trained)
        metrics = diary.records[1][1]
        differ = sum(one != other for one, other in scores)
        assert metrics["rollout/prompts_missing"] == 6 - differ
        assert metrics["objective/zero_variance_groups"] == pytest.approx(1 - differ / 6)
        if rounds == 1:
            assert metrics["rollout/prompts_drawn"] == 6 + 6 - len(telling)
    assert metrics["rollout/prompts_drawn"] <= 16, "the prompt set is drawn once at most"
    assert metrics["rollout/prompts_missing"] == 0 or metrics["rollout/prompts_drawn"] == 16


def test_the_critic_warms_up_alone(folder):
    recipe = tiny_recipe(ppo={"steps": 2, "critic_warmup_steps": 1})
    start = LocalRoles(recipe, folder).weights()
    roles, diary = LocalRoles(recipe, folder), Diary(stop_after=1)
    real_loop(recipe, roles, diary).run()
    moved = differing(start, roles.weights())
    assert moved == [name for name in start if name.startswith("1/")], "the critic's, and none of the policy's"
    first = diary.records[1][1]
    assert "policy/loss" not in first and "value/loss" in first
    rest = Diary()
    real_loop(recipe, roles, rest, diary.saves[-1]).run()
    assert "policy/loss" in rest.records[-1][1]


def test_terms_judge_and_length_are_metrics(folder):
    """Each figure against one made from the texts themselves."""
    terms = {
        "t": {"function": "loops:count_t", "weight": 2.0},
        "words": {"function": "loops:words", "weight": -0.5},
    }
    recipe = tiny_recipe(
        ppo={"steps": 1, "rewards": terms, "judge_evaluations": True},
        evaluation={"judge_function": "loops:count_t"},
    )
    roles, diary = LocalRoles(recipe, folder), Diary()
    texts, lengths = [], []
    score = roles.reward.score

    def spy(rollouts):
        texts.append([text for rollout in rollouts for _, text in roles.reward.texts(rollout, 99)])
        lengths.append([n for rollout in rollouts for n in rollout.sequences.response_lengths.tolist()])
        return score(rollouts)

    roles.reward.score = spy
    real_loop(recipe, roles, diary).run()
    held_out, trained, _ = texts
    evaluated, metrics = diary.records[0][1], diary.records[1][1]
    for prefix, drawn, found in (("eval", held_out, evaluated), ("objective", trained, metrics)):
        t, count = (np.mean(function([], drawn)) for function in (count_t, words))
        assert found[f"{prefix}/score/t"] == pytest.approx(t) and found[f"{prefix}/score/words"] == pytest.approx(count)
        assert found[f"{prefix}/score"] == pytest.approx(2 * t - 0.5 * count, abs=1e-6)
    assert evaluated["eval/judge"] == evaluated["eval/score/t"]
    totals = [2 * t - 0.5 * count for t, count in zip(count_t([], trained), words([], trained), strict=True)]
    expected = np.corrcoef(totals, lengths[1])[0, 1]
    assert metrics["objective/score_length_corr"] == pytest.approx(expected, abs=1e-6)
    assert not any(name.endswith(("timeouts", "disagreement")) for name in metrics)


def test_log_probs_that_do_not_repeat_stop_the_run(folder):
    """Old log-probs of another temperature: the first ratio is not 1, and nothing else would tell."""
    recipe = tiny_recipe(ppo={"max_mismatch": 100.0, "max_mismatch_kl": 100.0})
    roles = LocalRoles(recipe, folder)
    policy, logprobs = roles.policy.roles[0], roles.policy.roles[0].logprobs

    def at_another_temperature(rollout):
        policy.engine.module.temperature = 0.5
        try:
            return logprobs(rollout)
        finally:
            policy.engine.module.temperature = 1.0

    policy.logprobs = at_another_temperature
    with pytest.raises(MismatchError, match="max_first_approx_kl"):
        real_loop(recipe, roles, Diary()).run()


@pytest.mark.parametrize("algorithm", [
    pytest.param({}, id="ppo"), pytest.param({"advantage": "rloo"}, id="rloo", marks=pytest.mark.thorough),
    pytest.param({"advantage": "grpo", "kl_in": "loss", "kl_estimator": "k3", "loss_aggregation": "sequence_mean"}, id="grpo",
                 marks=pytest.mark.thorough),
    pytest.param({"advantage": "reinforce_pp"}, id="reinforce_pp", marks=pytest.mark.thorough),
])  # fmt: skip
def test_the_score_rises(folder, algorithm):
    recipe = tiny_recipe(
        generation={"stop": (), "chunk_size": 16},
        ppo={
            "steps": 25,
            "rollout_batch_size": 16,
            "samples_per_prompt": 2,
            "minibatch_size": 32,
            "microbatch_size": 32,
            "ppo_epochs": 3,
            "learning_rate": 5e-3,
            "critic_learning_rate": 5e-3,
            "kl_coef": 0.01,
            "missing_eos_penalty": 0,
            "eval_every": 25,
            "checkpoint_every": 100,
            "reward_function": "loops:count_t",
            **algorithm,
        },
    )
    _, diary = run_real(recipe, folder)
    scores = [metrics["objective/score"] for _, metrics in diary.records[1:]]
    assert sum(scores[-5:]) / 5 > 4 * max(sum(scores[:5]) / 5, 0.1), scores
