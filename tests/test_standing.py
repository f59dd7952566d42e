"""A reward model or judge that is no better than chance, or was cut off: said everywhere, and PPO asks before it trains on it."""

import json

import pytest
from command import rlhf_ray
from test_report import interval, summary
from tiny import tiny_recipe

from rlhf_ray.config.recipe_file import build_recipe
from rlhf_ray.errors import UserError
from rlhf_ray.evaluation.verdict import verdict, warnings
from rlhf_ray.rewards.standing import refuse_weak_reward, standing_of, standings
from rlhf_ray.runs.closing import closing_words
from rlhf_ray.runs.pipeline import run_stages
from rlhf_ray.runs.resume import check_resume, write_recipe
from rlhf_ray.runs.run_folder import RunFolder
from rlhf_ray.supervised.reward_metrics import heldout_figures, pair_figures


def done(right, pairs, steps=400, planned=400, **more):
    """Closing figures of a reward model that orders `right` of `pairs` pairs as people do."""
    import numpy as np

    margins = np.where(np.arange(pairs) < right, 1.0, -1.0)
    lengths = np.full(pairs, 5)
    figures = pair_figures(margins, np.zeros(pairs), lengths, lengths)
    times = {"train_seconds": 120.0, "measure_seconds": 336.0}
    return {"steps": steps, "planned_steps": planned, "ended_by": "steps", "eval_rows": pairs, **times, **figures, **more}


def finished(folder, **stages):
    for name, figures in stages.items():
        folder.stage(name).path.mkdir(parents=True)
        folder.stage(name).finish(figures)
    return folder


def recipe_of(accept=False, **sections):
    ppo = {"accept_weak_reward": accept} | sections.pop("ppo", {})
    return tiny_recipe(ppo=ppo, **sections)


@pytest.mark.parametrize(
    "right, pairs, above",
    [(1, 1, False), (3, 3, False), (4, 8, False), (6, 8, False), (7, 8, True), (1, 8, False), (140, 250, False), (145, 250, True)],
)
def test_above_chance_means_the_lower_end_of_the_interval(right, pairs, above):
    """By hand, Wilson's lower end is above 1/2 where p is and (2 p - 1)**2 n > 1.96**2 = 3.84: 6 of 8 gives 2, 7 of 8 4.5, 140 of
    250 3.6, 145 of 250 6.4, 3 of 3 3."""
    assert standing_of("reward", done(right, pairs), "pairs").above_chance is above


def test_ppo_against_a_weak_reward_model_is_refused_in_words(tmp_path):
    folder = finished(RunFolder(tmp_path), reward=done(5, 8))
    with pytest.raises(UserError) as refused:
        refuse_weak_reward(recipe_of(), folder)
    words = str(refused.value)
    assert "no better than chance" in words and "62.5\u00a0% (30.6\u00a0to\u00a086.3) on 8 held-out pairs" in words
    assert "ppo.accept_weak_reward: true" in words
    refuse_weak_reward(recipe_of(accept=True), folder)
    with pytest.raises(UserError):
        refuse_weak_reward(recipe_of(accept="early"), folder)


def test_one_that_max_minutes_ended_is_asked_about_too(tmp_path):
    folder = finished(RunFolder(tmp_path), reward=done(200, 250, steps=44, planned=114))
    with pytest.raises(UserError, match=r"stopped by reward.max_minutes at step 44 of 114.*accept_weak_reward: early"):
        refuse_weak_reward(recipe_of(), folder)
    for accepted in ("early", True):
        refuse_weak_reward(recipe_of(accept=accepted), folder)


def test_scores_are_judged_by_their_correlation(tmp_path):
    import numpy as np

    rng = np.random.default_rng(0)
    human = rng.normal(size=200)
    for predicted, refused in ((rng.normal(size=200), True), (human + rng.normal(size=200), False)):
        scores = {"scores": predicted, "human": human, "lengths": rng.integers(1, 9, 200)}
        figures = {"steps": 9, "planned_steps": 9} | heldout_figures(scores, seed=0, middle=0.0)
        recipe, folder = recipe_of(reward={"objective": "scores"}), RunFolder(tmp_path / str(refused))
        finished(folder, reward=figures)
        if refused:
            with pytest.raises(UserError, match=r"correlation with people's scores .* on 200 held-out scored replies"):
                refuse_weak_reward(recipe, folder)
        else:
            refuse_weak_reward(recipe, folder)


def test_what_has_no_reward_model_is_asked_nothing(tmp_path):
    """A function's score, a model from elsewhere, a reward stage that is still to come, DPO."""
    folder = finished(RunFolder(tmp_path / "a"), reward=done(5, 8))
    scored = {"reward_function": "user_scores:brevity", "critic_init": "sft"}
    refuse_weak_reward(recipe_of(ppo=scored), folder)
    refuse_weak_reward(recipe_of(ppo={"rewards": {"r": {"model": "some/where"}}}), folder)
    refuse_weak_reward(recipe_of(), RunFolder(tmp_path / "b"))
    assert standings(recipe_of(dpo={}), RunFolder(tmp_path / "b")) == {"reward_model": None, "judge": None}


def test_an_ensemble_counts_as_a_whole_and_its_shortest_training(tmp_path):
    members = {"member_1": done(6, 8, steps=3, planned=400), "ensemble": done(230, 250)}
    standing = standing_of("reward", done(4, 8) | members, "pairs")
    assert standing.above_chance and standing.rows == 250 and (standing.steps, standing.planned_steps) == (3, 400)


def test_figures_of_an_older_version_have_no_interval():
    old = {"steps": 400, "accuracy": 0.872, "pairs": 250, "eval_rows": 250}
    standing = standing_of("reward", old, "pairs")
    assert standing.above_chance and not standing.ended_early and standing.figure["low"] == pytest.approx(0.825, abs=1e-3)
    assert standing_of("reward", {"steps": 3}, "pairs") is None


def test_the_stage_is_refused_before_its_folder_is_made(tmp_path):
    """So that the recipe may still change what it likes of ppo."""
    folder = finished(RunFolder(tmp_path), data={}, sft={}, reward=done(5, 8))
    begun = []
    with pytest.raises(UserError, match="accept_weak_reward"):
        run_stages(recipe_of(), folder, {"ppo": lambda *_: begun.append(1) or {}}, lambda event: None, ["ppo"])
    assert not folder.stage("ppo").path.exists() and not begun
    run_stages(recipe_of(accept=True), folder, {"ppo": lambda *_: begun.append(1) or {}}, lambda event: None, ["ppo"])
    assert begun == [1]


def test_doctor_says_so_and_a_begun_run_may_accept_it(tmp_path):
    folder = finished(RunFolder(tmp_path / "run"), data={}, sft={}, reward=done(5, 8))
    recipe = recipe_of()
    write_recipe(recipe, folder.recipe)
    answer = rlhf_ray("doctor", str(folder.recipe), "--run-dir", str(folder.path))
    assert answer.returncode == 2 and "ppo.accept_weak_reward: true" in answer.stderr, answer.stderr
    folder.stage("ppo").path.mkdir()
    assert check_resume(recipe_of(accept=True), folder) == ["ppo.accept_weak_reward"]
    values = recipe.model_dump(mode="json")
    assert build_recipe(values, ["ppo.accept_weak_reward=early"], "r").ppo.accept_weak_reward == "early"
    with pytest.raises(UserError, match="accept_weak_reward"):
        build_recipe(values, ["ppo.accept_weak_reward=perhaps"], "r")


# -- the headline, the terminal, the report -----------------------------------------------------------------------------


def summary_with(judge=None, reward=None, rate=0.25):
    given = {"judge": ("judge", judge), "reward_model": ("reward", reward)}
    scorers = {name: figures and standing_of(stage, figures, "pairs").to_json() for name, (stage, figures) in given.items()}
    return json.loads(json.dumps(summary(judge=rate) | {"scorers": scorers}))


def test_no_verdict_under_a_judge_that_knows_nothing():
    headline = verdict(summary_with(judge=done(4, 8, steps=1, planned=3)), [])
    assert headline.startswith("No verdict: the independent judge is no better than chance")
    assert "50.0\u00a0% (21.5\u00a0to\u00a078.5) on 8 held-out pairs" in headline
    assert "made the model worse" not in headline and "beats" not in headline
    assert headline.endswith("The independent judge was stopped by judge.max_minutes at step 1 of 3.")


def test_a_judge_that_was_cut_off_is_no_flat_verdict():
    early = done(230, 250, steps=1, planned=3)
    worse, better = (verdict(summary_with(judge=early, rate=rate), []) for rate in (0.25, 0.8))
    assert worse.startswith("PPO looks worse than SFT: it wins only 25.0")
    assert better.startswith("PPO looks better than SFT: it wins 80.0")
    assert all(each.endswith("was stopped by judge.max_minutes at step 1 of 3.") for each in (worse, better))
    assert verdict(summary_with(judge=done(230, 250)), []).startswith("PPO made the model worse")


def test_a_weak_reward_model_is_said_beside_a_good_judge():
    headline = verdict(summary_with(judge=done(230, 250), reward=done(4, 8), rate=0.8), [])
    assert headline.startswith("PPO beats SFT in 80.0") and "The reward model is no better than chance" in headline
    (warning,) = warnings(summary_with(judge=done(230, 250), reward=done(4, 8), rate=0.8))
    assert "The reward model is no better than chance" in warning and "on 8 held-out pairs" in warning


def test_the_reward_models_own_verdict_is_none_either():
    alone = summary_with(reward=done(4, 8)) | {}
    alone["win_rate"]["judge"] = None
    assert verdict(alone, []).startswith("No verdict: the reward model is no better than chance")


def test_the_line_of_a_finished_stage():
    assert closing_words(done(145, 250)) == "accuracy 58.0\u00a0% (51.8 to 64.0) on 250 held-out pairs"
    cut = closing_words(done(145, 250, steps=30, planned=400))
    assert cut.endswith("max_minutes ended the training at step 30 of 400 (2.0 min of training, 5.6 min of measuring)")
    assert closing_words({"steps": 5, "eval_loss": 2.0}) == ""
    assert interval(1.0)["mean"] == 1.0
