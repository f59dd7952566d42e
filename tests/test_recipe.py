"""Recipe files, overrides, a run folder that is picked up again, the pipeline."""

import pytest
import yaml
from tiny import tiny_recipe

from rlhf_ray.config import Recipe
from rlhf_ray.config.recipe_file import build_recipe, load_recipe, packaged_recipes, read_yaml
from rlhf_ray.config.stage_table import BUILT_IN
from rlhf_ray.errors import UserError
from rlhf_ray.runs.pipeline import prepare_folder, run_stages
from rlhf_ray.runs.resume import check_resume, write_recipe
from rlhf_ray.runs.run_folder import RunFolder


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
