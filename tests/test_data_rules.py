"""The data stage: which rows stay, how sources are mixed and split."""

import math

import pytest
from data_rows import (
    data_tokenizer,  # noqa: F401 - fixtures
    encode_pair,
    limits_of,
)

from rlhf_ray.data.mixing import mix, split
from rlhf_ray.data.rules import Tally, apply_rules
from rlhf_ray.data.tokens import encode_prompt
from rlhf_ray.errors import UserError


def pair(prompt="p", chosen="good", rejected="bad"):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "messages": None, "key": prompt}


def test_every_rule_counts_what_it_drops(tokenizer):
    rows = [
        pair(),
        pair(),  # duplicate
        pair(chosen=" same ", rejected="same"),
        pair(rejected="  "),
        pair(chosen="a <|eos|> b"),
        pair(chosen="fox " * 100),
        pair(prompt="q", chosen="good<|eos|>"),
    ]
    tally = Tally()
    kept = apply_rules(rows, "pairs", limits_of(tokenizer), tally)
    assert [(row["prompt"], row["chosen"]) for row in kept] == [("p", "good"), ("q", "good")]
    assert tally.dropped == {"duplicate": 1, "tie": 1, "empty_reply": 1, "special_token": 1, "over_long": 1}
    assert tally.cut == {"eos_text": 1}
    assert (tally.read, tally.kept) == (7, 2)


def test_scores_that_are_no_numbers_are_counted(tokenizer):
    rows = [
        {"prompt": "", "response": f"r{i}", "score": s, "messages": None}
        for i, s in enumerate([1, "2.5", None, math.nan, "x"])
    ]
    tally = Tally()
    assert [row["score"] for row in apply_rules(rows, "scores", limits_of(tokenizer), tally)] == [1.0, 2.5]
    assert tally.dropped == {"no_score": 3}


@pytest.mark.parametrize(("side", "expected"), [("left", "on the mat"), ("right", "the cat sat"), ("drop", None)])
def test_the_side_of_a_long_prompt_that_is_cut_is_a_setting(tokenizer, side, expected):
    text = "the cat sat on the mat"
    limit = 3  # every word here is one token of this vocabulary
    assert len(encode_prompt(tokenizer, text)) == 6
    tally = Tally()
    rows = [{"prompt": text, "messages": None, "key": text}]
    kept = apply_rules(rows, "prompts", limits_of(tokenizer, max_prompt_tokens=limit, truncate_prompt=side), tally)
    assert [row["prompt"].strip() for row in kept] == ([expected] if expected else [])
    assert (tally.cut, tally.dropped) == (({"prompt": 1}, {}) if expected else ({}, {"over_long": 1}))


@pytest.mark.parametrize(("limit", "kept"), [(6, 1), (5, 0)])
def test_a_prompt_of_just_as_many_tokens_as_the_limit_stays(tokenizer, limit, kept):
    tally, rows = Tally(), [{"prompt": "the cat sat on the mat", "messages": None, "key": "k"}]  # six tokens
    assert len(apply_rules(rows, "prompts", limits_of(tokenizer, max_prompt_tokens=limit, truncate_prompt="drop"), tally)) == kept


def test_a_long_row_loses_prompt_before_reply_and_fits(tokenizer):
    limits = limits_of(tokenizer, max_prompt_tokens=5, max_length=20, truncate_reply="left")
    rows = [
        pair(prompt="the cat " * 20, chosen=" fox" * 8, rejected=" dog"),
        pair(prompt="the cat " * 20, chosen=" fox" * 40),
    ]
    tally = Tally()
    kept = apply_rules(rows, "pairs", limits, tally)
    for row in kept:
        assert len(encode_pair(tokenizer, row["prompt"], row["chosen"])[0]) <= 20
    assert kept[0]["chosen"] == " fox" * 8
    assert len(encode_prompt(tokenizer, kept[0]["prompt"])) == 20 - 1 - 8  # all the room that is left
    assert len(encode_prompt(tokenizer, kept[1]["prompt"])) == 5
    assert tally.cut == {"prompt": 2, "reply": 1}


def keyed(prefix, count):
    return [{"key": f"{prefix}{i}"} for i in range(count)]


def test_without_weights_every_row_is_used_once():
    rows, used = mix([keyed("a", 10), keyed("b", 1000)], [None, None], 0, "x")
    assert used == [10, 1000] and len({row["key"] for row in rows}) == 1010


def test_weights_are_the_proportions_of_the_mix():
    rows, used = mix([keyed("a", 100), keyed("b", 90)], [3.0, 1.0], 0, "x")
    assert used == [100, 33]
    assert rows == mix([keyed("a", 100), keyed("b", 90)], [3.0, 1.0], 0, "x")[0]
    assert [row["key"][0] for row in rows[:20]] != ["a"] * 20  # in random order


def test_a_weight_for_some_sources_only_is_refused():
    with pytest.raises(UserError, match=r"data.sft\[1\] has no weight"):
        mix([keyed("a", 3), keyed("b", 3)], [1.0, None], 0, "data.sft")


def test_a_prompt_is_never_on_both_sides_and_the_share_is_met():
    rows = [{"key": f"prompt {i % 500}", "n": i} for i in range(2000)]
    train, held_out = split(rows, 0.2, 0, "x")
    assert not {row["key"] for row in train} & {row["key"] for row in held_out}
    assert len(train) + len(held_out) == 2000
    assert 0.15 < len(held_out) / 2000 < 0.25  # 500 prompts: one standard deviation is 0.018
    # Another role, with other rows and a smaller number of them, decides alike about a prompt that both have.
    other_train, other_held_out = split([{"key": f"prompt {i}"} for i in range(100, 900)], 0.2, 0, "y")
    assert not {row["key"] for row in train} & {row["key"] for row in other_held_out}
    assert not {row["key"] for row in other_train} & {row["key"] for row in held_out}


def test_who_is_held_out_is_the_same_in_every_process():
    # From outside: `printf 0/a8 | b2sum -l 64` begins with 01, a0 with 1b, a4 with 2b, a7 with 2c; 0.2 is 33.
    assert {row["key"] for row in split(keyed("a", 10), 0.2, 0, "x")[1]} == {"a8", "a0", "a4", "a7"}


@pytest.mark.parametrize("share", [0.001, 0.899])
def test_neither_side_is_empty(share):
    for seed in range(20):
        train, held_out = split(keyed("a", 2), share, seed, "x")
        assert len(train) == len(held_out) == 1


def test_one_prompt_cannot_be_split():
    with pytest.raises(UserError, match="at least two different prompts"):
        split([{"key": "a"}] * 5, 0.1, 0, "data.preferences")
