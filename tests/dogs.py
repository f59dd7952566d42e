"""Pairs of a world where people prefer cats to dogs, and what DPO starts from."""

import random

import pytest
from cats import WORDS
from tiny import tiny_recipe

from rlhf_ray.models.tokenizer import train_tokenizer

SCRATCH = {"layers": 2, "width": 32, "heads": 2, "positions": 96, "vocab_size": 300}


def words(rng, low, high):
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))


def pairs_of(rng, count):
    """People prefer cats."""
    rows = []
    for _ in range(count):
        reply = " " + words(rng, 3, 9)
        rows.append({
            "prompt": words(rng, 1, 5),
            "chosen": reply.replace("dog", "cat") + " cat",
            "rejected": reply.replace("cat", "dog") + " dog" * rng.randint(1, 4),
        })  # fmt: skip
    return rows


@pytest.fixture(name="tokenizer", scope="module")
def dogs_tokenizer():
    rng = random.Random(0)
    return train_tokenizer([words(rng, 20, 20) for _ in range(50)], 300)


@pytest.fixture(name="recipe", scope="module")
def dogs_recipe():
    return tiny_recipe(model={"from_scratch": SCRATCH}, sft={"max_length": 48}, reward={"max_length": 48})
