"""A task whose answers can be checked: adding two numbers, the sum's units written first.

    3 7 + 5 8 =  ->   5 9 0

Every sum here needs a carry, and nine in ten demonstrations forget it. A model that imitates them is right as often as
they are. Reinforcement learning finds out from the exact match alone which of the two ways of adding is right: it has
no reward model and no human labels, and it is shown no sums. The recipe `arithmetic` does it with GRPO.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from rlhf_ray.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset


def build(
    root: str | None = None,
    seed: int = 0,
    *,
    digits: int = 2,
    careless: float = 0.9,
    sft_rows: int = 3500,
    sft_eval_rows: int = 200,
    eval_prompts: int = 512,
) -> dict[str, Dataset]:
    """Demonstrations, prompts and held-out prompts; the prompts of both kinds have a column `answer`.

    All are pairs of numbers of `digits` digits whose sum needs a carry; no pair is in two roles. A share `careless` of
    the demonstrations forgets every carry. Raises UserError if `root` is given (there is nothing to read) or if there
    are too few pairs.
    """
    if root is not None:
        raise UserError(f"data.root = {root!r}, but the sums are generated, not read; remove data.root")
    from datasets import Dataset  # takes half a second, and `exact` does not need it

    rng = random.Random(seed)
    base = 10**digits
    numbers = rng.sample(range(base * base), min(base * base, 100_000))
    pairs = [(a, b) for a, b in (divmod(number, base) for number in numbers) if add(a, b) != forgetful(a, b)]
    sizes = {"sft": sft_rows, "sft_eval": sft_eval_rows, "eval_prompts": eval_prompts}
    left = len(pairs) - sum(sizes.values())
    if left < eval_prompts:
        raise UserError(
            f"data.builder_args ask for {sum(sizes.values())} of {len(pairs)} pairs of {digits}-digit numbers, which leaves "
            f"{left} as prompts; ask for fewer, or set digits to {digits + 1}"
        )
    roles = {}
    for role, size in (sizes | {"prompts": left}).items():
        chosen, pairs = pairs[:size], pairs[size:]
        columns = {"prompt": [question(a, b, digits) for a, b in chosen]}
        if role.startswith("sft"):
            sums = [(forgetful if rng.random() < careless else add)(a, b) for a, b in chosen]
            columns["response"] = [written(number, digits + 1) for number in sums]
        else:
            columns["answer"] = [written(add(a, b), digits + 1) for a, b in chosen]
        roles[role] = Dataset.from_dict(columns)
    return roles


def add(a: int, b: int) -> int:
    return a + b


def forgetful(a: int, b: int) -> int:
    """The sum without its carries: 37 + 58 gives 85."""
    total, place = 0, 1
    while a or b:
        total += (a % 10 + b % 10) % 10 * place
        a, b, place = a // 10, b // 10, place * 10
    return total


def question(a: int, b: int, digits: int) -> str:
    """The prompt. Spaces between the digits make each digit a token."""
    return f"{' '.join(f'{a:0{digits}d}')} + {' '.join(f'{b:0{digits}d}')} ="


def written(number: int, digits: int) -> str:
    """The number with its units first: the order in which one adds on paper."""
    return " " + " ".join(reversed(f"{number:0{digits}d}"))


def exact(prompts: list[str], responses: list[str], *, answer: list[str]) -> list[float]:
    """1 where the response is exactly the sum, else 0. `answer` is a column of the prompts' rows."""
    return [float(response == sum_) for response, sum_ in zip(responses, answer, strict=True)]
