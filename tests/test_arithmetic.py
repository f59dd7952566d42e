"""The task with checkable answers."""

import pytest

from rlhf_ray.config.recipe_file import load_recipe
from rlhf_ray.data.arithmetic import add, build, exact, forgetful, question, written
from rlhf_ray.errors import UserError
from rlhf_ray.models.tokenizer import train_tokenizer


def test_a_sum_by_hand():
    assert question(37, 5, 2) == "3 7 + 0 5 ="
    assert written(add(37, 5), 3) == " 2 4 0"
    assert written(add(999, 1), 4) == " 0 0 0 1"


def numbers_of(prompt):
    """The two numbers, read from the prompt by another way than the one that wrote it."""
    return [int(number.replace(" ", "")) for number in prompt.removesuffix(" =").split(" + ")]


def test_every_prompt_stands_beside_its_own_answer():
    roles = build(sft_rows=2000, sft_eval_rows=20, eval_prompts=50)
    assert all(set(roles[role].column_names) == {"prompt", "answer"} for role in ("prompts", "eval_prompts"))
    for role in ("prompts", "eval_prompts"):
        for prompt, answer in zip(roles[role]["prompt"], roles[role]["answer"], strict=True):
            assert int(answer[::-1].replace(" ", "")) == sum(numbers_of(prompt)) and len(answer) == 6  # three digits


def test_who_forgets_to_carry():
    assert [forgetful(37, 58), forgetful(50, 70), forgetful(12, 34), forgetful(99, 1)] == [85, 20, 46, 90]


def test_only_the_sum_and_nothing_else_counts():
    responses = [" 2 4 0", " 2 4 0 ", " 2 4", "2 4 0", " 2 4 0 0", " 0 4 2", ""]
    assert exact(["3 7 + 0 5 ="] * 7, responses, answer=[" 2 4 0"] * 7) == [1, 0, 0, 0, 0, 0, 0]


def test_no_pair_of_numbers_stands_in_two_roles_and_every_sum_needs_a_carry():
    roles = build(sft_rows=2000, sft_eval_rows=20, eval_prompts=50)
    # 55 of the 100 pairs of digits make less than 10, so 55 * 55 of the pairs of numbers need no carry.
    assert {name: len(rows) for name, rows in roles.items()} == {
        "sft": 2000, "sft_eval": 20, "eval_prompts": 50, "prompts": 10_000 - 55 * 55 - 2070,
    }  # fmt: skip
    prompts = [prompt for rows in roles.values() for prompt in rows["prompt"]]
    assert len(set(prompts)) == len(prompts)
    right = []
    for prompt, response in zip(roles["sft"]["prompt"], roles["sft"]["response"], strict=True):
        right.append(int(response[::-1].replace(" ", "")) == sum(numbers_of(prompt)))
    assert 0.07 < sum(right) / len(right) < 0.13  # one in ten: a deviation of 0.007
    for prompt, response, good in zip(roles["sft"]["prompt"], roles["sft"]["response"], right, strict=True):
        a, b = numbers_of(prompt)
        assert int(response[::-1].replace(" ", "")) == (a + b if good else forgetful(a, b))
    assert build(seed=1)["sft"]["prompt"] != build(seed=0)["sft"]["prompt"]


def test_more_rows_than_pairs_are_refused():
    with pytest.raises(UserError, match="leaves 5 as prompts"):  # 45 pairs of digits make 10 or more
        build(digits=1, sft_rows=20, sft_eval_rows=10, eval_prompts=10)
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
