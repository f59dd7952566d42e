"""A recipe's problems are told all at once, whichever section's they are and whatever hides behind another."""

import pytest
from command import rlhf_ray

from rlhf_ray.config.problems import mentions
from rlhf_ray.config.recipe_file import build_recipe, load_recipe
from rlhf_ray.errors import UserError


def problems(values):
    with pytest.raises(UserError) as told:
        build_recipe(values, [], "r.yaml")
    return str(told.value).splitlines()


def parts_in(lines, parts):
    assert len(lines) == len(parts), lines
    for part in parts:
        assert sum(part in line for line in lines) == 1, (part, lines)


def test_values_of_several_sections_and_what_sections_must_agree_on():
    lines = problems({
        "reward": None,
        "generation": {"temperature": -1, "min_new_tokens": 500},
        "ppo": {"stepz": 3, "minibatch_size": 64, "rollout_batch_size": 64, "overlong_buffer": 400},
        "resources": {"policy": {"actors": 3}, "weight_transport": "ipc"},
        "evaluation": {"max_kl": -1},
        "data": {"holdout": 3},
    })  # fmt: skip
    parts_in(lines, [
        "'generation.temperature' is -1", "unknown key 'ppo.stepz'", "'evaluation.max_kl' is -1", "'data.holdout' is 3",
        "min_new_tokens = 500", "64 is not a multiple of 3", "weight_transport is ipc", "reward is null", "overlong_buffer = 400",
    ])  # fmt: skip


def test_several_rules_of_one_section():
    lines = problems({
        "ppo": {
            "samples_per_prompt": 1, "advantage": "grpo", "dynamic_sampling_rounds": 2, "weights_in_flight": True,
            "best_by": "judge", "minibatch_size": 48,
        },
        "sft": {"batch_size": 7, "microbatch_size": 2},
    })  # fmt: skip
    parts_in(lines, [
        "advantage grpo compares", "dynamic_sampling_rounds looks", "weights_in_flight is true", "best_by is 'judge'",
        "64 is not a multiple of 48", "7 is not a multiple of 2",
    ])  # fmt: skip


def test_each_term_and_each_source_has_its_own():
    lines = problems({
        "ppo": {"rewards": {"a b": {"weight": 1}, "c": {"function": "x:y", "model": "z"}, "d": {"function": "x:y"}}},
        "model": {"from_scratch": {"width": 10, "heads": 3}},
        "data": {"max_prompt_tokens": 5000, "sft": [{"pth": "a"}, {"path": "b", "weight": -1}]},
        "plugins": ["no_such_module"],
        "nonsense": {},
    })  # fmt: skip
    for part in ("rewards.a b: the term has neither", "rewards.c: the term has both", "10 is not a multiple of 3",
                 "5048 is longer than", "'data.sft.0.path' is missing", "unknown key 'data.sft.0.pth'", "'data.sft.1.weight' is -1",
                 "the module 'no_such_module' could not be imported"):  # fmt: skip
        assert sum(part in line for line in lines) == 1, (part, lines)


def test_a_key_of_the_same_name_in_another_section_hides_nothing():
    """reward's rule is looked at when its learning rate is set back, after sft.batch_size has been."""
    lines = problems({
        "sft": {"batch_size": "many"},
        "reward": {"learning_rate": -1, "batch_size": 7, "microbatch_size": 2},
        "judge": {"lora": {"rank": 0}, "freeze_layers": "x"},
        "ppo": {"lora": {"rank": 4}, "freeze_layers": 2, "steps": 0},
    })  # fmt: skip
    parts_in(lines, [
        "'sft.batch_size' is 'many'", "'reward.learning_rate' is -1", "7 is not a multiple of 2", "'judge.lora.rank' is 0",
        "'judge.freeze_layers' is 'x'", "'ppo.steps' is 0", "ppo.lora",
    ])  # fmt: skip
    lines = problems({"judge": 5, "evaluation": {"bootstrap": -1}, "ppo": {"best_by": "judge", "steps": 0}})
    parts_in(lines, ["'judge' is 5", "'evaluation.bootstrap' is -1", "'ppo.steps' is 0", "ppo.best_by is 'judge'"])


def test_the_defaults_of_a_section_that_is_wrong_as_a_whole_are_nobodys_words():
    """The model's default has 64 positions: fewer than this prompt, but nobody wrote them."""
    assert len(problems({"model": 5, "data": {"max_prompt_tokens": 5000}})) == 1


def test_a_sentence_names_a_key_by_its_path_or_within_its_section():
    rule = "ppo.rollout_batch_size * samples_per_prompt must divide by minibatch_size"
    assert mentions(rule, ["ppo.minibatch_size"]) and mentions(rule, ["ppo.rollout_batch_size"])
    assert not mentions(rule, ["sft.minibatch_size", "ppo.batch_size", "rollout_batch_size"])
    odd = "batch_size = 7 is odd"
    assert mentions(odd, ["sft.batch_size"], "sft") and not mentions(odd, ["sft.batch_size"], "reward")
    assert mentions("target is 0", ["ppo.adaptive_kl.target"], "ppo")
    assert mentions("reward is null", ["reward"]) and not mentions("the reward model is unknown", ["reward"])
    assert mentions("data.sft[0]: no column 'a'", ["data.sft"]) and mentions("ppo.lora.rank is 0", ["ppo.lora"])
    assert not mentions("model.name_or_path: there is no folder 'ppo'", ["ppo", "name_or_path", "reward.name_or_path"])


def test_nothing_is_told_that_nobody_wrote():
    assert len(problems({"ppo": {"minibatch_size": "many"}})) == 1
    assert len(problems({"generation": {"max_new_tokens": -5}, "data": {"max_prompt_tokens": 200}})) == 1
    assert len(problems({"ppo": 5})) == 1


def test_doctor_looks_at_the_data_of_a_recipe_with_mistakes(tmp_path):
    (tmp_path / "r.yaml").write_text(
        "name: r\nppo: {steps: 0, reward_function: no_such_module:f}\n"
        "data: {sft: [{path: missing.jsonl}], preferences: [{path: missing.jsonl}]}\n"
    )
    answer = rlhf_ray("doctor", str(tmp_path / "r.yaml"), cwd=tmp_path)
    assert answer.returncode == 2
    for part in ("'ppo.steps' is 0", "data.sft[0]: ", "data.preferences[0]: ", "no_such_module"):
        assert part in answer.stderr, answer.stderr


def test_a_key_that_stands_twice_in_a_recipe_is_told(tmp_path):
    (tmp_path / "r.yaml").write_text("name: r\nppo: {steps: 3}\nsft: {max_steps: 1, max_steps: 2}\nppo: {steps: 4}\n")
    with pytest.raises(UserError, match=r"r.yaml is not YAML \(line \d\): the key '(ppo|max_steps)' stands there twice"):
        load_recipe(str(tmp_path / "r.yaml"))
    (tmp_path / "r.yaml").write_text("name: r\nppo: &common {steps: 3}\ndata: {}\n")
    assert load_recipe(str(tmp_path / "r.yaml")).ppo.steps == 3
