"""Recipes: what is wrong is told with the key, the value and the remedy, before anything starts."""

import pytest
import yaml
from tiny import tiny_recipe

from rlhf_ray.config import Recipe, exact_div
from rlhf_ray.config.recipe_file import build_recipe, load_recipe, packaged_recipes, read_yaml
from rlhf_ray.config.stage_table import BUILT_IN, needs_of
from rlhf_ray.errors import UserError
from rlhf_ray.runs.pipeline import prepare_folder, run_stages
from rlhf_ray.runs.resume import check_resume, ppo_goes_on, write_recipe
from rlhf_ray.runs.run_folder import RunFolder


def refusal(values, overrides=()):
    with pytest.raises(UserError) as caught:
        build_recipe({"name": "x", **values}, list(overrides), "x.yaml")
    return str(caught.value)


def scratch(**sizes):
    return {"from_scratch": {"positions": 64, **sizes}}


# -- what is refused --------------------------------------------------------------------------------------------------


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


# -- files and overrides ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override, section, key, value",
    [
        ("ppo.learning_rate=1e-5", "ppo", "learning_rate", 1e-5),  # YAML 1.1 reads 1e-5 as text
        ("ppo.learning_rate=3.0e-4", "ppo", "learning_rate", 3e-4),
        ("ppo.steps=12", "ppo", "steps", 12),
        ("ppo.anneal=false", "ppo", "anneal", False),
        ("ppo.reward_function=my.module:fn", "ppo", "reward_function", "my.module:fn"),
        ("evaluation.seeds=[1, 2]", "evaluation", "seeds", (1, 2)),
        ("data.root=/data/a=b", "data", "root", "/data/a=b"),
        ("data.root=null", "data", "root", None),
        ("sft.max_length=64", "sft", "max_length", 64),
    ],
)
def test_an_override_has_the_type_that_it_looks_like(override, section, key, value):
    recipe = build_recipe({"name": "x"}, [override], "x")
    found = getattr(getattr(recipe, section), key)
    assert found == value and type(found) is type(value)


def test_a_later_override_wins_and_the_rest_stays():
    values = {"name": "x", "ppo": {"steps": 5, "gamma": 0.9}}
    recipe = build_recipe(values, ["ppo.steps=6", "ppo.steps=7", "seed=3"], "x")
    assert (recipe.ppo.steps, recipe.ppo.gamma, recipe.seed) == (7, 0.9, 3)


def test_an_override_of_a_section_and_of_a_new_one():
    recipe = build_recipe({"name": "x"}, ["ppo.adaptive_kl.target=4", "fluency=null", "judge={objective: scores}"], "x")
    assert (recipe.ppo.adaptive_kl.target, recipe.fluency, recipe.judge.objective) == (4, None, "scores")


@pytest.mark.parametrize("values", [{}, {"dpo": None}, {"dpo": {"epochs": 2}}])
@pytest.mark.parametrize("override", ["dpo={}", "dpo.beta=0.1"])
def test_an_override_switches_a_section_on_that_is_null_or_not_there(values, override):
    recipe = build_recipe({"name": "x", **values}, [override], "x")
    assert recipe.dpo.beta == 0.1
    assert build_recipe({"name": "x"}, ["dpo.beta=0.3", "dpo.loss=ipo"], "x").dpo.loss == "ipo"


def test_dpo_is_as_long_as_the_reward_models_pairs_unless_told_otherwise():
    def length(**sections):
        return build_recipe({"name": "x", **sections}, [], "x").max_length_of("dpo")

    assert length(dpo={}, reward={"max_length": 96}) == 96
    assert length(dpo={"max_length": 80}, reward={"max_length": 96}) == 80
    assert length(dpo={}, reward=None, ppo={"reward_function": "a:b", "critic_init": "sft"}) == 256
    assert load_recipe("demo", ["dpo={}"]).max_length_of("dpo") == load_recipe("demo").reward.max_length


def test_a_number_in_quotes_stays_text():
    assert build_recipe({}, ["name='1e5'"], "x").name == "1e5"


@pytest.mark.parametrize("override", ["ppo.steps", "=3", "ppo.stepz=3"])
def test_a_bad_override_is_refused(override):
    with pytest.raises(UserError, match="--set|did you mean 'steps'"):
        build_recipe({"name": "x"}, [override], "x")


def test_an_override_that_only_looks_like_a_date_is_text_and_a_long_number_is_told():
    assert build_recipe({}, ["name=2024-99-99"], "x").name == "2024-99-99"
    with pytest.raises(UserError, match="'seed' is inf"):
        build_recipe({"name": "x"}, ["seed=" + "1" * 5000], "x")


def test_scientific_notation_in_a_file_is_a_number_too(tmp_path):
    (tmp_path / "mine.yaml").write_text("ppo: {learning_rate: 1e-5}\n")
    recipe = load_recipe(str(tmp_path / "mine.yaml"))
    assert recipe.ppo.learning_rate == 1e-5 and recipe.name == "mine"


@pytest.mark.parametrize(
    "text, part",
    [
        ("ppo: {steps: [", "not YAML (line"),
        ("- a\n- b\n", "no mapping"),
        ("", "no mapping"),
        ("\x00", "not YAML"),
        ("name: x\nseed: 2024-13-45", "(line 2): '2024-13-45' is no timestamp (month must be in 1..12)"),
        ("seed: " + "1" * 5000, "(line 1): '1111"),
        ("a:\n- !!map [1]", "(line 2): expected a mapping"),
        ("a: !!int abc", "(line 1): 'abc' is no int"),
        ("a: !!timestamp x", "(line 1): 'x' is no timestamp"),
        ("name: x\nseed: 0x" + "f" * 5000, "'seed' is a number of thousands of digits"),
    ],
)
def test_a_file_that_is_no_recipe_is_told(tmp_path, text, part):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        load_recipe(str(tmp_path / "bad.yaml"))
    assert part in str(caught.value)


def test_a_name_that_is_no_recipe_gets_the_nearest(tmp_path):
    with pytest.raises(UserError, match="did you mean 'demo'"):
        read_yaml("dmo")
    with pytest.raises(UserError, match="is a folder"):
        read_yaml(str(tmp_path))


@pytest.mark.parametrize("name", packaged_recipes())
def test_the_packaged_recipes_are_valid_and_survive_being_written(name, tmp_path):
    recipe = load_recipe(name)
    assert recipe.name == name
    write_recipe(recipe, tmp_path / "recipe.yaml")
    assert load_recipe(str(tmp_path / "recipe.yaml")) == recipe


def test_the_demo_is_packaged():
    assert "demo" in packaged_recipes()


# -- a run folder that is picked up again -----------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A run folder of the tiny recipe whose data and SFT stages are done."""
    folder = RunFolder(tmp_path / "run")
    prepare_folder(tiny_recipe(), folder)
    for name in ("data", "sft"):
        folder.stage(name).finish({})
    return folder


def changed(**sections):
    return tiny_recipe(**sections)


def test_the_same_recipe_goes_on(folder):
    assert check_resume(tiny_recipe(), folder) == []


@pytest.mark.parametrize(
    "sections, keys",
    [
        ({"ppo": {"steps": 9}}, ["ppo.steps"]),
        ({"ppo": {"kl_coef": 0.2, "learning_rate": 1e-4}}, ["ppo.kl_coef", "ppo.learning_rate"]),
        (
            {"resources": {"policy": {"actors": 2, "zero_stage": 2}}},
            ["resources.policy.actors", "resources.policy.zero_stage"],
        ),
        ({"evaluation": {"seeds": [3]}}, ["evaluation.seeds"]),
        ({"name": "other"}, ["name"]),
        ({"ppo": {"gradient_checkpointing": True}}, ["ppo.gradient_checkpointing"]),
        ({"ppo": {"gamma": 0.9}}, ["ppo.gamma"]),  # PPO has not begun
        ({"reward": {"objective": "scores"}}, ["reward.objective"]),  # nor has the reward model
    ],
)
def test_what_may_change_may(folder, sections, keys):
    assert check_resume(changed(**sections), folder) == keys


@pytest.mark.parametrize(
    "sections, told",
    [
        ({"seed": 5}, "seed (0 -> 5)"),
        ({"model": {"from_scratch": {"layers": 3}}}, "model.from_scratch.layers (2 -> 3)"),
        ({"sft": {"max_length": 48}}, "sft.max_length (64 -> 48)"),
        ({"data": {"holdout": 0.1}}, "data.holdout (0.05 -> 0.1)"),
        ({"generation": {"temperature": 0.7}}, "generation.temperature (1.0 -> 0.7)"),
    ],
)
def test_what_may_not_change_is_named(folder, sections, told):
    with pytest.raises(UserError) as caught:
        check_resume(changed(**sections), folder)
    assert told in str(caught.value) and "--run-dir" in str(caught.value)


def test_a_begun_stage_is_fixed_but_for_its_safe_keys(folder):
    folder.stage("ppo").path.mkdir()
    with pytest.raises(UserError, match=r"ppo.gamma \(1.0 -> 0.9\)"):
        check_resume(changed(ppo={"gamma": 0.9, "steps": 9}), folder)
    with pytest.raises(UserError, match="ppo.lora"):
        check_resume(changed(ppo={"lora": {}}), folder)
    assert check_resume(changed(ppo={"steps": 9}), folder) == ["ppo.steps"]


def test_a_key_that_an_older_version_did_not_write_has_its_default(folder):
    values = yaml.safe_load(folder.recipe.read_text())
    del values["seed"]
    folder.recipe.write_text(yaml.safe_dump(values))
    assert check_resume(tiny_recipe(), folder) == []


# -- the pipeline -----------------------------------------------------------------------------------------------------


def scripted_stages(folder, ran, stop_at=None):
    def stage(name):
        def run(recipe, folder, progress):
            ran.append(name)
            if name == stop_at:
                raise UserError("stopped here")
            folder.stage(name).finish({"steps": recipe.ppo.steps})

        return run

    return {name: stage(name) for name in BUILT_IN}


def quiet(progress):
    pass


def test_stages_run_in_order_and_finished_ones_are_skipped(tmp_path):
    recipe, folder, ran = tiny_recipe(), RunFolder(tmp_path), []
    prepare_folder(recipe, folder)
    with pytest.raises(UserError, match="stopped here"):
        run_stages(recipe, folder, scripted_stages(folder, ran, stop_at="reward"), quiet)
    run_stages(recipe, folder, scripted_stages(folder, ran), quiet)
    assert ran == ["data", "sft", "reward", "reward", "ppo", "evaluation"]


def test_optional_stages_are_those_of_the_recipe():
    assert tiny_recipe().stages == ["data", "sft", "reward", "ppo", "evaluation"]
    optional = {name: {"max_length": 64} for name in ("judge", "fluency", "dpo")}
    assert tiny_recipe(**optional).stages == list(BUILT_IN)


def test_a_stage_whose_input_is_missing_says_which(tmp_path):
    recipe, folder = tiny_recipe(), RunFolder(tmp_path)
    prepare_folder(recipe, folder)
    with pytest.raises(UserError, match="stage 'ppo' needs 'data'"):
        run_stages(recipe, folder, scripted_stages(folder, []), quiet, ["ppo"])
    with pytest.raises(UserError, match="no stage 'judge'"):
        run_stages(recipe, folder, scripted_stages(folder, []), quiet, ["judge"])


def test_more_ppo_steps_reopen_ppo_and_evaluation(tmp_path):
    recipe, folder, ran = tiny_recipe(), RunFolder(tmp_path), []
    prepare_folder(recipe, folder)
    run_stages(recipe, folder, scripted_stages(folder, []), quiet)
    longer = changed(ppo={"steps": 6})
    prepare_folder(longer, folder)
    run_stages(longer, folder, scripted_stages(folder, ran), quiet)
    assert ran == ["ppo", "evaluation"]
    with pytest.raises(UserError, match="has done 6 PPO steps"):
        prepare_folder(recipe, folder)
    assert Recipe.model_validate(yaml.safe_load(folder.recipe.read_text())).ppo.steps == 6


def test_another_evaluation_reopens_the_evaluation(tmp_path):
    recipe, folder, ran = tiny_recipe(), RunFolder(tmp_path), []
    prepare_folder(recipe, folder)
    run_stages(recipe, folder, scripted_stages(folder, []), quiet)
    other = changed(evaluation={"seeds": [1]})
    prepare_folder(other, folder)
    run_stages(other, folder, scripted_stages(folder, ran), quiet)
    assert ran == ["evaluation"]


def test_a_run_folder_records_where_it_ran(folder):
    environment = yaml.safe_load((folder.path / "environment.json").read_text())
    assert {"python", "versions", "git_commit", "cpu", "cpus", "memory_gb", "gpus"} <= environment.keys()
    assert environment["cpus"] >= 1 and environment["versions"]["torch"]
