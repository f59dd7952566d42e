"""The task with a checkable answer."""

import pytest

from rlhf_ray.data.sorting import build, exact
from rlhf_ray.errors import UserError
from rlhf_ray.recipe_file import load_recipe


def test_only_the_letters_in_order_and_nothing_else_are_right():
    prompts = ["sort: h c k a ->"] * 6
    responses = [" a c h k", " a c k h", "a c h k", " a c h k ", " a c h", " a c h k k"]
    assert exact(prompts, responses) == [1, 0, 0, 0, 0, 0]


def test_demonstrations_are_right_as_often_as_said_and_no_prompt_stands_in_two_roles():
    roles = build(seed=3, sft_rows=4000, prompts=300, eval_prompts=200, correct=0.2)
    right = sum(exact(roles["sft"]["prompt"], roles["sft"]["response"])) / 4000
    # And a random order is right once in 24 to 720 times: 0.8 * (1/24 + 1/120 + 1/720) / 3 = 0.0137; five deviations.
    assert right == pytest.approx(0.2137, abs=5 * (0.2137 * 0.7863 / 4000) ** 0.5)
    prompts = [prompt for rows in roles.values() for prompt in rows["prompt"]]
    assert len(set(prompts)) == len(prompts) == 4000 + 500 + 300 + 200
    for prompt, response in zip(roles["sft"]["prompt"], roles["sft"]["response"], strict=True):
        letters = prompt.removeprefix("sort: ").removesuffix(" ->").split()
        assert sorted(letters) == sorted(response.split()) and len(set(letters)) == len(letters)
    assert build(seed=3, sft_rows=10)["sft"].to_dict() == build(seed=3, sft_rows=10)["sft"].to_dict()


@pytest.mark.parametrize("arguments, message", [
    ({"root": "there"}, "remove data.root"),
    ({"shortest": 7}, "choose 2 <= shortest"),
    ({"shortest": 2, "longest": 2, "prompts": 1000}, "ask for fewer"),
])  # fmt: skip
def test_impossible_arguments_are_said_in_words(arguments, message):
    with pytest.raises(UserError, match=message):
        build(**arguments)


def test_the_recipe_needs_neither_reward_model_nor_critic():
    recipe = load_recipe("sorting")
    assert recipe.reward is None and set(recipe.ppo_roles) == {"generation", "reward", "reference", "policy"}
