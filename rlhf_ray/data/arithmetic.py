"""A task whose answers can be checked: adding two numbers, the sum's units written first.

    3 7 + 5 8 =  ->   5 9 0

A model that saw a few demonstrations gets some sums right. Reinforcement learning from the exact match alone takes it from
there: no reward model, no people, no sum shown again. The recipe `arithmetic` does it with GRPO.
"""

from __future__ import annotations

import random

import datasets

from rlhf_ray.errors import UserError


def build(
    root: str | None = None,
    seed: int = 0,
    *,
    digits: int = 2,
    sft_rows: int = 2000,
    sft_eval_rows: int = 200,
    eval_prompts: int = 512,
) -> dict[str, datasets.Dataset]:
    """Demonstrations, prompts and held-out prompts: different pairs of numbers of `digits` digits each, no pair in two roles.

    Raises UserError if `root` is given (there is nothing to read) or there are not so many pairs.
    """
    if root is not None:
        raise UserError(f"data.root = {root!r}, but the sums are generated, not read; remove data.root")
    pairs = 100**digits
    sizes = {"sft": sft_rows, "sft_eval": sft_eval_rows, "eval_prompts": eval_prompts}
    left = pairs - sum(sizes.values())
    if left < eval_prompts:
        raise UserError(
            f"data.builder_args ask for {sum(sizes.values())} of the {pairs} pairs of {digits}-digit numbers, which leaves "
            f"{left} as prompts; ask for fewer, or set digits to {digits + 1}"
        )
    order = random.Random(seed).sample(range(pairs), min(pairs, 50_000 + sum(sizes.values())))
    roles = {}
    for role, size in (sizes | {"prompts": len(order) - sum(sizes.values())}).items():
        chosen, order = order[:size], order[size:]
        numbers = [divmod(number, 10**digits) for number in chosen]
        columns = {"prompt": [question(a, b, digits) for a, b in numbers]}
        if role.startswith("sft"):
            columns["response"] = [answer(prompt) for prompt in columns["prompt"]]
        roles[role] = datasets.Dataset.from_dict(columns)
    return roles


def question(a: int, b: int, digits: int) -> str:
    """Digits apart, so that each is a token."""
    return f"{' '.join(f'{a:0{digits}d}')} + {' '.join(f'{b:0{digits}d}')} ="


def answer(prompt: str) -> str:
    """The sum with one digit more than the numbers, units first: the order in which carries go, as on paper."""
    a, b = prompt.removesuffix("=").replace(" ", "").split("+")
    return " " + " ".join(reversed(f"{int(a) + int(b):0{len(a) + 1}d}"))


def exact(prompts: list[str], responses: list[str]) -> list[float]:
    """1 for the sum and nothing else, 0 for anything else."""
    return [float(response == answer(prompt)) for prompt, response in zip(prompts, responses, strict=True)]
