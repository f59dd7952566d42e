"""Recipes that are refused, in words."""

import pytest
from tiny import tiny_recipe

from rlhf_ray.config import exact_div
from rlhf_ray.config.recipe_file import build_recipe
from rlhf_ray.config.stage_table import needs_of
from rlhf_ray.errors import UserError
from rlhf_ray.runs.resume import ppo_goes_on


def refusal(values, overrides=()):
    with pytest.raises(UserError) as caught:
        build_recipe({"name": "x", **values}, list(overrides), "x.yaml")
    return str(caught.value)


def scratch(**sizes):
    return {"from_scratch": {"positions": 64, **sizes}}


@pytest.mark.parametrize(
    "values, key, nearest",
    [
        ({"ppo": {"learning_rte": 1}}, "ppo.learning_rte", "learning_rate"),
        ({"pppo": {}}, "pppo", "ppo"),
        ({"resources": {"policy": {"zero_stag": 2}}}, "resources.policy.zero_stag", "zero_stage"),
        ({"data": {"sft": [{"path": "a", "colums": {}}]}}, "data.sft.0.colums", "columns"),
        ({"ppo": {"adaptive_kl": {"targe": 3}}}, "ppo.adaptive_kl.targe", "target"),
        ({"ppo": {"rewards": {"weight": {"model": "m", "wieght": 1}}}}, "ppo.rewards.weight.wieght", "weight"),
        ({"sft": {"pakcing": True}}, "sft.pakcing", "packing"),
    ],
)
def test_an_unknown_key_gets_the_nearest_name(values, key, nearest):
    assert refusal(values) == f"unknown key '{key}'; did you mean '{nearest}'?"


def test_a_key_like_no_other_gets_all_the_names():
    assert "the keys there are target, horizon" in refusal({"ppo": {"adaptive_kl": {"xyzzy": 3}}})


@pytest.mark.parametrize(
    "values, parts",
    [
        ({"ppo": {"steps": "many"}}, ["'ppo.steps' is 'many'", "integer"]),
        ({"ppo": {"steps": 1.5}}, ["'ppo.steps' is 1.5"]),
        ({"ppo": {"steps": 0}}, ["'ppo.steps' is 0", "greater than 0"]),
        ({"ppo": {"gae_lambda": 1.1}}, ["'ppo.gae_lambda' is 1.1", "less than or equal to 1"]),
        ({"ppo": {"critic_init": "random"}}, ["'ppo.critic_init' is 'random'", "'reward' or 'sft'"]),
        ({"resources": {"policy": {"zero_stage": 4}}}, ["'resources.policy.zero_stage' is 4"]),
        ({"seed": -1}, ["'seed' is -1"]),
        ({"seed": 2**32}, ["'seed' is 4294967296", "less than"]),  # NumPy's seeds end at 2**32 - 1
        ({"ppo": {"seed": 2**70}}, ["'ppo.seed' is 1180591620717411303424"]),
        ({"evaluation": {"seeds": []}}, ["'evaluation.seeds' is []"]),
        ({"sft": {"max_steps": 0}}, ["sft.max_steps: max_steps is 0", "-1 for as many"]),
        ({"reward": {"max_steps": -7}}, ["'reward.max_steps' is -7"]),
        ({"name": "a/b"}, ["'name' is 'a/b'"]),
        ({"name": ".."}, ["'name' is '..'"]),  # its run folder would be this one
        ({"name": "."}, ["'name' is '.'"]),
        ({"name": "a" * 201}, ["at most 200 characters"]),  # folders end at 255, and files beside it are named after it
        ({"model": {"name_or_path": "a\0b"}}, ["model.name_or_path: a NUL character", "remove it"]),
        ({"data": {"sft": [{"path": "a", "columns": {"prompt": "\0"}}]}}, ["data.sft.0.columns: a NUL character"]),
        ({"data": {"sft": [{"split": "train"}]}}, ["'data.sft.0.path' is missing"]),
        ({"data": {"sft": [{"path": ""}]}}, ["'data.sft.0.path' is ''", "at least 1 character"]),
        ({"data": {"root": ""}}, ["'data.root' is ''"]),
        ({"data": {"sft": [{"path": "a", "weight": -1}]}}, ["'data.sft.0.weight' is -1"]),
    ],
)
def test_a_wrong_value_is_told_with_its_key(values, parts):
    message = refusal(values)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    "values, parts",
    [
        ({"ppo": {"rollout_batch_size": 60}}, ["60 is not a multiple of 64", "ppo.rollout_batch_size"]),
        (
            {"ppo": {"rollout_batch_size": 100, "minibatch_size": 48, "microbatch_size": 16}},
            ["100 is not a multiple of 48; try 96"],
        ),
        ({"ppo": {"microbatch_size": 24}}, ["ppo.minibatch_size must divide by microbatch_size", "64", "24"]),
        ({"resources": {"policy": {"actors": 3}}}, ["resources.policy.actors", "64 is not a multiple of 3"]),
        ({"resources": {"critic": {"actors": 3}}}, ["resources.critic.actors", "64 is not a multiple of 3"]),
        ({"sft": {"batch_size": 32, "microbatch_size": 5}}, ["sft", "32 is not a multiple of 5; try 30"]),
        ({"sft": {"batch_size": 32, "workers": 3}}, ["batch_size must divide by workers"]),
        ({"model": {"from_scratch": {"width": 30, "heads": 4}}}, ["30 is not a multiple of 4"]),
    ],
)
def test_a_division_with_a_rest_is_told_with_what_would_work(values, parts):
    message = refusal(values)
    assert all(part in message for part in parts), message


def test_a_token_budget_holds_a_sequence():
    values = {"name": "x", "data": {"max_prompt_tokens": 64}, "generation": {"max_new_tokens": 100}}
    assert "ppo.microbatch_tokens = 163 does not hold one sequence, which may have 164 tokens" in refusal(
        values | {"ppo": {"microbatch_tokens": 163}}
    )
    ppo = {
        "microbatch_tokens": 164,
        "minibatch_size": 64,
        "microbatch_size": 24,
    }  # a size that does not divide is not used
    build_recipe(values | {"ppo": ppo}, [], "x")


def test_kept_forward_passes_meet_the_policy_that_made_them():
    several = {"ppo": {"reuse_forward": True, "rollout_batch_size": 64, "minibatch_size": 32}}
    assert "ppo.reuse_forward is true, but ppo.minibatch_size = 32 cuts a step's 64 rollouts into 2" in refusal(several)
    ranks = {"ppo": {"reuse_forward": True}, "resources": {"critic": {"actors": 2}}}
    assert "ppo.reuse_forward is true, but resources.critic.actors = 2" in refusal(ranks)
    whole = {"ppo": {"reuse_forward": True}, "resources": {"policy": {"zero_stage": 3}}}
    assert "ppo.reuse_forward is true, but resources.policy.zero_stage is 3" in refusal(whole)


def test_the_second_divisor_of_a_rank_is_checked_too():
    """12 rollouts a rank don't divide into microbatches of 8."""
    ppo = {"rollout_batch_size": 24, "minibatch_size": 24, "microbatch_size": 8}
    assert "must divide by ppo.microbatch_size" in refusal({"ppo": ppo, "resources": {"policy": {"actors": 2}}})
    build_recipe({"name": "x", "ppo": ppo}, [], "x")


def test_exact_div_names_the_nearest_that_works():
    assert exact_div(12, 4, "x") == 3
    for total, part, nearest in ((13, 4, 12), (3, 4, 4), (7, 0, 7)):
        with pytest.raises(ValueError, match=f"x: {total} is not a multiple of {part}; try {nearest}"):
            exact_div(total, part, "x")


@pytest.mark.parametrize(
    "values, part",
    [
        (
            {
                "model": scratch(),
                "sft": {"max_length": 64},
                "reward": {"max_length": 64},
                "data": {"max_prompt_tokens": 17},
            },
            "data.max_prompt_tokens + generation.max_new_tokens = 65 is longer than model.from_scratch.positions = 64",
        ),
        (
            {
                "model": scratch(),
                "sft": {"max_length": 65},
                "reward": {"max_length": 64},
                "data": {"max_prompt_tokens": 16},
            },
            "sft.max_length = 65 is longer than model.from_scratch.positions = 64",
        ),
        (
            {
                "model": scratch(),
                "sft": {"max_length": 64},
                "reward": {"max_length": 80},
                "data": {"max_prompt_tokens": 16},
            },
            "reward.max_length = 80",
        ),
    ],
)
def test_sequences_must_fit_into_the_positions(values, part):
    assert part in refusal(values)


@pytest.mark.parametrize(
    "values, part",
    [
        ({"reward": None}, "nothing scores the responses"),
        ({"reward": None, "ppo": {"reward_function": "a:b"}}, "set ppo.critic_init to 'sft'"),
        ({"sft": None}, "nothing would train the model"),
        ({"dpo": {}, "reward": {"objective": "scores"}}, "set reward.objective to pairs, or set dpo: null"),
        ({"dpo": {"loss": "ipo", "label_smoothing": 0.1}}, "dpo.label_smoothing is 0.1, but dpo.loss ipo has no"),
        ({"dpo": {"max_length": 300}}, "dpo.max_length = 300 is longer than model.from_scratch.positions = 256"),
        ({"dpo": {"label_smoothing": 0.5}}, "'dpo.label_smoothing' is 0.5: input should be less than 0.5"),
        (
            {"reward": None, "ppo": {"rewards": {"a": {"model": "reward"}}}},
            "ppo.rewards.a.model is 'reward' but reward is null",
        ),
        (
            {"reward": {"members": 3}, "ppo": {"reward_function": "a:b"}},
            "reward.members is 3, but no reward of PPO uses",
        ),
        ({"reward": {"members": 3}, "ppo": {"rewards": {"a": {"model": "./m"}}}}, "set reward.members to 1"),
        ({"reward": {"combine": "worst"}}, "reward: combine is 'worst' and members is 1"),
        ({"reward": {"members": 2, "combine_std": -1}}, "'reward.combine_std' is -1"),
        ({"ppo": {"judge_evaluations": True}}, "there is no judge; set the section judge or evaluation.judge_function"),
        ({"ppo": {"best_by": "judge"}}, "ppo.judge_evaluations is false; set it to true"),
        ({"judge": {"members": 2}, "evaluation": {"judge_positive_above": 3}}, "set judge.members to 1"),
        ({"ppo": {"lora": {}, "freeze_layers": 2}}, "ppo.lora is set and ppo.freeze_layers is 2"),
        ({"ppo": {"critic_lora": {}, "critic_freeze_layers": 1}}, "set ppo.critic_freeze_layers to 0"),
        ({"reward": {"lora": {}, "freeze_layers": 2}}, "reward: lora is set and freeze_layers is 2"),
        ({"ppo": {"critic_lora": {}, "advantage": "reinforce_pp"}}, "ppo.advantage reinforce_pp has no critic"),
        ({"ppo": {"lora": {"target_modules": []}}}, "ppo.lora: target_modules is empty"),
        ({"ppo": {"freeze_layers": 4}}, "ppo.freeze_layers = 4, but the model has 4 blocks"),
        ({"reward": {"freeze_layers": 5}}, "reward.freeze_layers = 5, but the model has 4 blocks"),
        ({"sft": {"lora": {}}}, "sft.lora is set, but sft starts from random weights"),
        ({"sft": None, "dpo": {"lora": {}}}, "dpo.lora is set, but dpo starts from random weights"),
        (
            {"reward": {"base": "model", "freeze_layers": 1}},
            "reward.freeze_layers is set, but reward starts from random",
        ),
    ],
)
def test_sections_that_need_each_other(values, part):
    assert part in refusal(values)


@pytest.mark.parametrize(
    "ppo, part",
    [
        ({"rewards": {"a": {}}}, "ppo.rewards.a: the term has neither function and model; give it exactly one"),
        ({"rewards": {"a": {"function": "m:f", "model": "reward"}}}, "the term has both function and model"),
        ({"rewards": {"a": {"model": "reward", "timeout_s": 2}}}, "timeout_s is 2, but model 'reward' is not a function"),
        ({"rewards": {"a": {"function": "m:f", "timeout_score": 0}}}, "timeout_score is 0, but there is no timeout_s"),
        ({"rewards": {"a": {"function": "m:f", "timeout_s": 0}}}, "'ppo.rewards.a.timeout_s' is 0"),
        ({"rewards": {"a/b": {"function": "m:f"}}}, "ppo.rewards has a term 'a/b'; name it with letters"),
        ({"rewards": {"a": {"function": "m:f"}}, "reward_function": "m:g"}, "make the function a term of ppo.rewards"),
        ({"reward_timeout_s": 3}, "ppo.reward_timeout_s is 3, but there is no ppo.reward_function"),
        ({"reward_function": "m:f", "reward_timeout_score": 3}, "there is no ppo.reward_timeout_s; set it too"),
        ({"patience": 0}, "'ppo.patience' is 0"),
    ],
)
def test_rewards_that_make_no_sense(ppo, part):
    assert part in refusal({"ppo": ppo})


def test_what_the_score_is_made_of():
    terms = lambda **ppo: build_recipe({"name": "x", "ppo": ppo}, [], "x").ppo.terms  # noqa: E731
    assert terms()["reward"].model == "reward"
    made = terms(reward_function="m:f", reward_timeout_s=2, reward_timeout_score=-1)["reward"]
    assert (made.function, made.timeout_s, made.timeout_score, made.weight) == ("m:f", 2, -1, 1)
    assert list(terms(rewards={"b": {"model": "reward"}, "a": {"function": "m:f", "weight": -2}})) == ["b", "a"]


def test_ppo_needs_the_judge_only_where_it_asks_it():
    judge = {"name": "x", "judge": {}, "ppo": {"judge_evaluations": True}}
    assert "judge" in needs_of(build_recipe(judge, [], "x"), "ppo")
    assert "judge" not in needs_of(build_recipe({"name": "x", "judge": {}}, [], "x"), "ppo")
    known = judge | {"evaluation": {"judge_function": "m:f"}}
    assert "judge" not in needs_of(build_recipe(known, [], "x"), "ppo")
    assert "reward" not in needs_of(
        build_recipe({"name": "x", "reward": None, "ppo": {"reward_function": "m:f", "critic_init": "sft"}}, [], "x"),
        "ppo",
    )


def test_a_run_that_ran_out_of_patience_goes_on_with_more_of_it_only():
    ended = {"steps": 60, "ended_by": "patience", "worse_since": 3}
    recipe = lambda **ppo: build_recipe({"name": "x", "ppo": {"steps": 100, **ppo}}, [], "x")  # noqa: E731
    assert not ppo_goes_on(recipe(patience=3), ended)
    assert not ppo_goes_on(recipe(patience=3, steps=500), ended), "more steps are no more patience"
    assert ppo_goes_on(recipe(patience=4), ended) and ppo_goes_on(recipe(), ended)
    assert not ppo_goes_on(recipe(patience=9, steps=60), ended)
    done = {"steps": 60, "ended_by": "steps", "worse_since": 0}
    assert (
        ppo_goes_on(recipe(), done) and ppo_goes_on(recipe(), {"steps": 60}) and not ppo_goes_on(recipe(steps=60), done)
    )


def test_what_an_adapter_replaces():
    """The reference actors; and sections that are not the recipe's model may freeze what they like."""
    values = {
        "name": "x",
        "ppo": {"lora": {"rank": 4, "alpha": 6}},
        "reward": {"base": "some/body", "freeze_layers": 30},
    }
    recipe = build_recipe(values, ["ppo.freeze_layers=0"], "x")
    assert list(recipe.ppo_roles) == ["generation", "reward", "policy", "critic"]
    assert recipe.ppo.lora.scaling == 1.5 and list(recipe.adapters) == ["ppo.lora"] and recipe.frozen_layers == {}


def test_every_problem_is_told_at_once():
    lines = refusal({"ppo": {"steps": 0, "gama": 1}, "seeed": 3}).splitlines()
    assert len(lines) == 3


def test_a_recipe_cannot_be_changed_after_validation():
    recipe = tiny_recipe()
    with pytest.raises(ValueError, match="frozen"):
        recipe.ppo.steps = 3
