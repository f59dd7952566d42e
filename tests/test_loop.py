"""The loop of PPO with scripted roles: checkpoints, evaluations, rates, ends."""

import json

import pytest
from loops import Diary, ScriptedRoles, scripted_loop

from rlhf_ray.ppo.loop import LoopState


def training_units(roles):
    return [chunk for verb, *what in roles.events if verb == "generate" for chunk in what[0] if not chunk.evaluation]


def test_evaluations_and_checkpoints_come_when_they_are_due():
    roles, diary = ScriptedRoles(), Diary()
    assert scripted_loop(roles, diary).run()
    assert diary.steps() == list(range(8))
    assert [step for step, metrics in diary.records if "eval/score" in metrics] == [0, 3, 6, 7] == diary.samples
    assert [state.step for state in diary.saves] == [2, 4, 6, 7]
    assert [event[1] for event in roles.events if event[0] == "load_weights"] == list(range(8))


def test_a_stop_request_ends_the_loop_with_a_checkpoint():
    diary = Diary(stop_after=3)
    loop = scripted_loop(ScriptedRoles(), diary)
    assert not loop.run()
    assert loop.state.step == 3 and [state.step for state in diary.saves] == [2, 3]


def test_a_step_is_saved_once():
    """Saving again would take the checkpoint away for a moment, and with it the run if the machine fails then."""
    diary = Diary(stop_after=4)
    assert not scripted_loop(ScriptedRoles(), diary).run()
    resumed = Diary(stop_after=-1)
    assert not scripted_loop(ScriptedRoles(), resumed, diary.saves[-1]).run()
    assert [state.step for state in diary.saves] == [2, 4] and resumed.saves == []


def test_a_stop_before_the_first_step_leaves_a_checkpoint_too():
    diary = Diary(stop_after=0)
    assert not scripted_loop(ScriptedRoles(), diary).run()
    assert [state.step for state in diary.saves] == [0]


def test_a_long_step_makes_a_checkpoint_overdue():
    diary = Diary()
    scripted_loop(ScriptedRoles(), diary, checkpoint_every=100, checkpoint_minutes=1e-9).run()
    assert [state.step for state in diary.saves] == [1, 2, 3, 4, 5, 6, 7]


def test_versions_are_published_when_they_are_due():
    diary, never = Diary(), Diary()
    scripted_loop(ScriptedRoles(), diary, publish_every=3).run()
    scripted_loop(ScriptedRoles(), never).run()
    assert (diary.published, never.published) == ([3, 6], [])  # of 7 steps


@pytest.mark.parametrize("stop_after", [1, 3, 4])
def test_a_resumed_loop_does_what_the_undisturbed_one_would(stop_after):
    options = {"adaptive_kl": {"target": 2.0, "horizon": 10}, "samples_per_prompt": 2, "minibatch_size": 8}
    scores = [1.0, 0.5, 2.0, 1.5]

    def run(roles, diary, state=None):
        scripted_loop(roles, diary, state, **options).run()
        return [(verb, *what) for verb, *what in roles.events if verb in ("generate", "update", "assemble", "evaluate")]

    whole = Diary()
    undisturbed = run(ScriptedRoles(kl=3.0, eval_scores=scores[:]), whole)
    first, second = Diary(stop_after=stop_after), Diary()
    before = run(ScriptedRoles(kl=3.0, eval_scores=scores[:]), first)
    left = scores[sum(event[0] == "evaluate" for event in before) :]
    state = LoopState.from_json(json.loads(json.dumps(first.saves[-1].to_json())))
    roles = ScriptedRoles(kl=3.0, eval_scores=left)
    assert before + run(roles, second, state) == undisturbed
    assert roles.events[1] == ("load_weights", stop_after)
    assert first.steps() + second.steps() == whole.steps()
    assert second.saves[-1] == whole.saves[-1]
    assert first.best + second.best == whole.best


def test_learning_rates_fall_linearly_or_stay():
    def rates(**options):
        roles = ScriptedRoles()
        scripted_loop(roles, Diary(), steps=4, learning_rate=0.4, critic_learning_rate=0.8, **options).run()
        return [event[2] for event in roles.events if event[0] == "update"]

    assert rates() == pytest.approx([0.4, 0.8, 0.3, 0.6, 0.2, 0.4, 0.1, 0.2])
    assert rates(anneal=False) == [0.4, 0.8] * 4


def test_the_adaptive_coefficient_follows_the_kl_and_a_fixed_one_stays():
    """kl 3 against a target of 2: the error 0.5 is clipped to 0.2; 4 episodes of a horizon of 10: 1.08 a step."""

    def coefficients(**options):
        roles, diary = ScriptedRoles(kl=3.0), Diary()
        scripted_loop(roles, diary, steps=3, kl_coef=0.1, **options).run()
        return [event[1] for event in roles.events if event[0] == "assemble"], diary.saves[-1].kl_coef

    used, after = coefficients(adaptive_kl={"target": 2.0, "horizon": 10})
    assert used == pytest.approx([0.1, 0.108, 0.11664]) and after == pytest.approx(0.1259712)
    assert coefficients() == ([0.1] * 3, 0.1)


def test_the_best_policy_is_kept():
    diary = Diary()
    loop = scripted_loop(ScriptedRoles(eval_scores=[1.0, 3.0, 2.0, 3.0]), diary)
    loop.run()
    assert diary.best == [3] and (loop.state.best_step, loop.state.best_score) == (3, 3.0)


def run_until(roles, stop_after=None, state=None, **options):
    """(the loop, whether it finished, what it told) of a run of at most 12 steps that evaluates each."""
    diary = Diary(stop_after=stop_after)
    loop = scripted_loop(roles, diary, state, **{"steps": 12, "eval_every": 1, "checkpoint_every": 3, **options})
    return loop, loop.run(), diary


def test_patience_ends_the_training_and_counts_evaluations_without_a_better_one():
    """Best at step 2; 3, 4 and 5 are no better (an equal one is not). The last step is checkpointed."""
    loop, finished, diary = run_until(ScriptedRoles(eval_scores=[0.0, 1.0, 4.0, 3.0, 4.0, 3.9]), patience=3)
    assert finished and diary.steps() == [0, 1, 2, 3, 4, 5]
    assert (loop.state.best_step, loop.state.best_score, loop.state.worse_since) == (2, 4.0, 3)
    assert diary.best == [1, 2] and [state.step for state in diary.saves] == [3, 5]
    assert [metrics["eval/best_step"] for _, metrics in diary.records] == [0, 1, 2, 2, 2, 2]


def test_a_better_policy_gives_patience_back():
    scores = [0.0, -1.0, -1.0, 1.0, 0.0, 0.0, 2.0, 1.0, 1.0, 1.0, 9.0]
    loop, finished, diary = run_until(ScriptedRoles(eval_scores=scores), patience=3)
    assert finished and loop.state.step == 9 and diary.best == [3, 6]


def test_without_patience_it_takes_all_steps():
    loop, finished, _ = run_until(ScriptedRoles(eval_scores=[9.0] + [0.0] * 12))
    assert finished and loop.state.step == 12 and loop.state.worse_since == 12


@pytest.mark.parametrize("stop_after", [0, 1, 2, 3, 4])
def test_a_stopped_run_has_as_much_patience_as_an_undisturbed_one(stop_after):
    scores = [0.0, 1.0, 0.5, 0.5, 0.5]
    whole = run_until(ScriptedRoles(eval_scores=scores[:]), patience=3, roll_back=True)
    first = run_until(ScriptedRoles(eval_scores=scores[:]), stop_after, patience=3, roll_back=True)
    assert first[1] == (stop_after == 4)
    state = LoopState.from_json(json.loads(json.dumps(first[2].saves[-1].to_json())))
    # A run that was stopped before its first step evaluates the start model once more.
    left = scores[stop_after + 1 :] if stop_after > 0 else scores[:]
    second = run_until(ScriptedRoles(eval_scores=left), None, state, patience=3, roll_back=True)
    assert second[1] and second[0].state == whole[0].state and whole[0].state.step == 4
    assert first[2].steps() + second[2].steps()[stop_after == 0 :] == whole[2].steps()
    assert first[2].best + second[2].best[stop_after == 0 :] == whole[2].best == [0, 1]


def test_a_run_stopped_before_its_first_step_loses_no_patience():
    """The start model, the best one, is evaluated once more when the run goes on."""
    first = run_until(ScriptedRoles(eval_scores=[2.0]), 0, patience=2)
    assert first[0].state.worse_since == 0 and first[2].saves[-1].step == 0
    loop, finished, _ = run_until(ScriptedRoles(eval_scores=[2.0, 1.0, 1.0, 1.0]), None, first[2].saves[-1], patience=2)
    assert finished and (loop.state.step, loop.state.best_step, loop.state.worse_since) == (2, 0, 2)


def test_a_checkpoint_of_a_run_that_ran_out_of_patience_ends_at_once():
    state = LoopState(kl_coef=0.1, step=5, best_score=4.0, best_step=2, worse_since=3)
    roles = ScriptedRoles()
    loop, finished, diary = run_until(roles, None, state, patience=3)
    assert finished and diary.steps() == [] and "generate" not in roles.verbs()
    loop, finished, _ = run_until(ScriptedRoles(), None, state, patience=8)
    assert finished and loop.state.step == 10


def test_the_judge_is_asked_in_evaluations_and_may_decide():
    """The score rises for ever, the judge's falls from step 2 on."""
    scripts = {"eval_scores": [0.0, 1.0, 2.0, 3.0, 4.0, 5.0], "eval_judge": [0.0, 1.0, 3.0, 2.0, 1.0, 0.0]}
    roles = ScriptedRoles(**{name: values[:] for name, values in scripts.items()})
    loop, finished, diary = run_until(roles, patience=2, judge_evaluations=True, best_by="judge")
    assert finished and (loop.state.step, loop.state.best_step, loop.state.best_score) == (4, 2, 3.0)
    assert [metrics["eval/judge"] for _, metrics in diary.records] == [0.0, 1.0, 3.0, 2.0, 1.0]
    assert roles.verbs().count("judge") == 5 and diary.best == [1, 2]
    assert {id(handle) for handle in roles.handles} == {id(handle) for handle in roles.waited}
    roles = ScriptedRoles(**scripts)
    loop, _, diary = run_until(roles, steps=4, judge_evaluations=True)
    assert loop.state.best_step == 4 and diary.best == [1, 2, 3, 4], (
        "the score decides unless the recipe says otherwise"
    )
    assert "judge" not in (roles := ScriptedRoles()).verbs() and run_until(roles)[1] and "judge" not in roles.verbs()


def test_the_start_model_is_kept_where_it_may_be_gone_back_to():
    scores = [5.0, 1.0, 1.0, 1.0]
    for roll_back, kept in ((True, [0]), (False, [])):
        loop, _, diary = run_until(ScriptedRoles(eval_scores=scores[:]), steps=3, roll_back=roll_back)
        assert diary.best == kept and loop.state.best_step == 0


def test_the_state_survives_json_before_the_first_evaluation_too():
    for state in (LoopState(kl_coef=0.3), LoopState(step=4, kl_coef=0.1 + 0.2, best_score=1 / 3, best_step=2)):
        assert LoopState.from_json(json.loads(json.dumps(state.to_json(), allow_nan=False))) == state


def test_every_step_trains_on_its_own_prompts():
    roles = ScriptedRoles()
    scripted_loop(roles, Diary(), steps=6, prompts=12).run()
    chunks = training_units(roles)
    for epoch in ((0, 1, 2), (3, 4, 5)):
        rows = [row for chunk in chunks if chunk.step in epoch for row in chunk.prompt_indices]
        assert sorted(rows) == list(range(12))
