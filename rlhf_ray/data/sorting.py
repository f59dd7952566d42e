"""A task with a checkable answer: put letters in order. The demonstrations are mostly wrong, the reward is never.

    sort: h c k a ->  a c h k

Whoever imitates the demonstrations answers correctly as often as they do (`correct`, about one in eight). Reinforcement
learning from the exact match alone has to find out which of the ways to answer is the right one: no reward model, no
human feedback, no answer shown. The recipe `sorting` does it with GRPO.
"""

from __future__ import annotations

import random

import datasets

from rlhf_ray.errors import UserError

LETTERS = "abcdefghijklmnop"
ASK, ANSWER = "sort: ", " ->"


def build(
    root: str | None = None,
    seed: int = 0,
    *,
    shortest: int = 4,
    longest: int = 6,
    correct: float = 0.12,
    sft_rows: int = 12000,
    prompts: int = 4000,
    eval_prompts: int = 512,
) -> dict[str, datasets.Dataset]:
    """SFT rows of which a share `correct` is right and the others are in a random order, and prompts. No letters twice
    in a prompt, no prompt twice in all.

    Raises UserError if `root` is given (there is nothing to read) or there are not so many prompts.
    """
    if root is not None:
        raise UserError(f"data.root = {root!r}, but the sorting task is generated, not read; remove data.root")
    if not 2 <= shortest <= longest <= len(LETTERS):
        raise UserError(
            f"data.builder_args have shortest {shortest} and longest {longest}; choose 2 <= shortest <= longest <= "
            f"{len(LETTERS)}"
        )
    rng = random.Random(seed)
    sizes = {"sft": sft_rows, "sft_eval": 500, "prompts": prompts, "eval_prompts": eval_prompts}
    questions = _distinct(sum(sizes.values()), shortest, longest, rng)
    roles = {}
    for role, size in sizes.items():
        texts, questions = questions[:size], questions[size:]
        columns = {"prompt": [ASK + " ".join(letters) + ANSWER for letters in texts]}
        if role.startswith("sft"):
            columns["response"] = [_demonstration(letters, correct, rng) for letters in texts]
        roles[role] = datasets.Dataset.from_dict(columns)
    return roles


def exact(prompts: list[str], responses: list[str]) -> list[float]:
    """1 for the letters of the prompt in order and nothing else, 0 for anything else."""
    return [float(response == answer(prompt)) for prompt, response in zip(prompts, responses, strict=True)]


def answer(prompt: str) -> str:
    return " " + " ".join(sorted(prompt.removeprefix(ASK).removesuffix(ANSWER).split()))


def _demonstration(letters: tuple[str, ...], correct: float, rng: random.Random) -> str:
    shown = sorted(letters) if rng.random() < correct else rng.sample(letters, len(letters))
    return " " + " ".join(shown)


def _distinct(count: int, shortest: int, longest: int, rng: random.Random) -> list[tuple[str, ...]]:
    found: dict[tuple[str, ...], None] = {}
    for _ in range(20 * count):
        if len(found) == count:
            return list(found)
        found[tuple(rng.sample(LETTERS, rng.randint(shortest, longest)))] = None
    raise UserError(f"data.builder_args ask for {count} different prompts, which the task hardly has; ask for fewer")
