"""The three recipes for SmolLM2-135M-Instruct: their builders' arguments, and that they fit the model."""

import pytest
from test_builders import PAIRS, build, dialogues, names, reviews  # noqa: F401 - fixtures

from rlhf_ray.config.recipe_file import load_recipe
from rlhf_ray.data import hh
from rlhf_ray.data.builder import find_builder
from rlhf_ray.data.instruction_rules import KINDS

RECIPES = ("smollm2-sentiment", "smollm2-helpful", "smollm2-instructions")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains_adapters_of_the_real_model(name):
    recipe = load_recipe(name)
    assert recipe.name == name and recipe.model.name_or_path == "HuggingFaceTB/SmolLM2-135M-Instruct"
    find_builder(recipe.data, recipe.seed)  # UserError where it has no such argument
    assert recipe.ppo.lora is not None and all(stage.lora is not None for stage in recipe.trained.values())
    assert recipe.ppo.critic_lora is not None or not recipe.ppo.has_critic
    assert recipe.ppo.checkpoint_minutes <= 10 and all(stage.checkpoint_minutes <= 10 for stage in recipe.trained.values())


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_imdb_holds_out_a_share(reviews, share):  # noqa: F811
    roles = build(reviews, eval_share=share, openings=0)
    assert len(roles["preferences_eval"]) == pytest.approx(400 * share, rel=0.1)
    assert len(roles["judge_eval"]) == pytest.approx(200 * share, rel=0.2)
    assert len(roles["preferences"]) + len(roles["preferences_eval"]) == 400
    assert not set(names(roles["preferences"])) & set(names(roles["preferences_eval"]))


def test_hh_leaves_long_dialogues_out(dialogues):  # noqa: F811
    """A prompt is "Human: Question 7? Assistant:", four words."""
    assert sum(len(hh.build(str(dialogues), max_prompt_words=4)[role]) for role in PAIRS) == 600
    with pytest.raises(ValueError):  # none is left
        hh.build(str(dialogues), max_prompt_words=3)["sft"]["messages"][0]


def test_a_fifth_of_the_kinds_or_more_are_held_out():
    held_out = [name for name, kind in KINDS.items() if kind.held_out]
    assert len(held_out) >= len(KINDS) / 5 and {KINDS[name].group for name in held_out} <= {
        kind.group for kind in KINDS.values() if not kind.held_out
    }
