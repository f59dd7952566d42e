"""The task with checkable answers."""

import pytest

from rlhf_ray.data.arithmetic import answer, build, exact, question
from rlhf_ray.errors import UserError
from rlhf_ray.models.tokenizer import train_tokenizer
from rlhf_ray.recipe_file import load_recipe


def test_a_sum_by_hand():
    assert question(37, 5, 2) == "3 7 + 0 5 ="
    assert answer("3 7 + 0 5 =") == " 2 4 0"
    assert answer("9 9 9 + 0 0 1 =") == " 0 0 0 1"


def test_only_the_sum_and_nothing_else_counts():
    responses = [" 2 4 0", " 2 4 0 ", " 2 4", "2 4 0", " 2 4 0 0", " 0 4 2", ""]
    assert exact(["3 7 + 0 5 ="] * 7, responses) == [1, 0, 0, 0, 0, 0, 0]


def test_no_pair_of_numbers_stands_in_two_roles_and_demonstrations_are_right():
    roles = build(sft_rows=300, sft_eval_rows=20, eval_prompts=50)
    assert {name: len(rows) for name, rows in roles.items()} == {
        "sft": 300, "sft_eval": 20, "eval_prompts": 50, "prompts": 9630,
    }  # fmt: skip
    prompts = [prompt for rows in roles.values() for prompt in rows["prompt"]]
    assert len(set(prompts)) == len(prompts) == 100 * 100
    for prompt, response in zip(roles["sft"]["prompt"], roles["sft"]["response"], strict=True):
        a, b = (int(number.replace(" ", "")) for number in prompt.removesuffix(" =").split(" + "))
        assert int(response[::-1].replace(" ", "")) == a + b
    assert build(seed=1)["sft"]["prompt"] != build(seed=0)["sft"]["prompt"]


def test_more_rows_than_pairs_are_refused():
    with pytest.raises(UserError, match="leaves 0 as prompts"):
        build(digits=1, sft_rows=80, sft_eval_rows=10, eval_prompts=10)
    with pytest.raises(UserError, match="remove data.root"):
        build("somewhere")


def test_every_digit_is_a_token_and_prompt_and_answer_fit_the_recipe():
    recipe = load_recipe("arithmetic")
    rows = build(**recipe.data.builder_args)["sft"]
    texts = [prompt + response for prompt, response in zip(rows["prompt"], rows["response"], strict=True)]
    tokenizer = train_tokenizer(texts, recipe.model.from_scratch.vocab_size)
    assert tokenizer.tokenize(" 0 4 2") == ["Ġ0", "Ġ4", "Ġ2"]
    assert max(len(ids) for ids in tokenizer(list(rows["prompt"])).input_ids) == 6 <= recipe.data.max_prompt_tokens
    answers = tokenizer(list(rows["response"]), add_special_tokens=False).input_ids
    assert {len(ids) + 1 for ids in answers} == {4} and recipe.generation.max_new_tokens >= 4
