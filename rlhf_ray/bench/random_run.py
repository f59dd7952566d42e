"""What the benchmarks run on: a recipe for a shape, and a run folder with random models and random prompts."""

from __future__ import annotations

import os
from typing import Any

from rlhf_ray.bench.flops import Shape, Work
from rlhf_ray.config import Precision, Recipe
from rlhf_ray.config.recipe_file import build_recipe
from rlhf_ray.config.threads import ALONE_ENVIRONMENT
from rlhf_ray.runs.run_folder import RunFolder


def bench_recipe(
    shape: Shape, work: Work, *, microbatch: int, precision: Precision, resources: dict[str, Any]
) -> Recipe:
    """Responses have exactly work.response tokens: an EOS ends none."""
    adapters = None if work.lora_rank is None else {"rank": work.lora_rank, "alpha": 2 * work.lora_rank}
    return build_recipe({
        "name": "bench",
        "model": {"from_scratch": {
            "architecture": "llama" if shape.gated else "gpt2",
            "layers": shape.layers, "width": shape.width, "heads": shape.heads, "vocab_size": shape.vocabulary,
            "key_value_heads": shape.key_value_heads, "positions": max(512, work.prompt + work.response),
        }},
        "data": {"max_prompt_tokens": work.prompt},
        "generation": {"max_new_tokens": work.response, "min_new_tokens": work.response, "chunk_size": work.rows},
        "ppo": {"rollout_batch_size": work.rows, "minibatch_size": work.rows, "microbatch_size": min(microbatch, work.rows),
                "ppo_epochs": work.epochs, "precision": precision, "max_mismatch": 100.0, "max_mismatch_kl": 100.0,
                "lora": adapters, "critic_lora": adapters,
                "reuse_forward": all(resources.get(role, {}).get("actors", 1) == 1 for role in ("policy", "critic"))},
        "resources": resources,
    }, [], "bench")  # fmt: skip


def cores() -> int:
    return len(os.sched_getaffinity(0))


def write_random_run(recipe: Recipe, folder: RunFolder, *, prompts: int, length: int, reward: bool = True) -> None:
    """A run folder with a random policy, a random reward model and prompts of exactly `length` tokens."""
    from rlhf_ray.data.role_files import write_role
    from rlhf_ray.models.load import build_causal_lm, build_reward_model
    from rlhf_ray.models.save import save_model
    from rlhf_ray.models.tokenizer import word_tokenizer

    tokenizer = word_tokenizer(recipe.model.from_scratch.vocab_size)
    model = build_causal_lm(recipe.model, tokenizer, recipe.seed)
    models = {"sft": model}
    if reward:
        models["reward"] = build_reward_model(model, tokenizer, recipe.seed)
    for stage, saved in models.items():
        folder.stage(stage).path.mkdir(parents=True)
        save_model(saved, tokenizer, folder.stage(stage).model, "Random weights, for benchmarks.\n")
    ids = random_prompts(recipe.model.from_scratch.vocab_size, prompts, length, recipe.seed)
    rows = [{"prompt": " ".join(f"t{token}" for token in row)} for row in ids]
    for role in ("prompts", "eval_prompts"):
        write_role(folder, role, rows, ("prompt",))


def random_prompts(vocabulary: int, prompts: int, length: int, seed: int) -> list[list[int]]:
    """Token ids; the tokenizer's last two, EOS and PAD, are not among them."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocabulary - 2, (prompts, length), generator=generator).tolist()


def torch_that_spins():
    """torch as generation actors and replicas have it.

    libgomp reads its environment once, when torch is loaded; a process that loaded it earlier keeps its own choice.
    """
    before = {name: os.environ.get(name) for name in ALONE_ENVIRONMENT}
    os.environ.update(ALONE_ENVIRONMENT)
    import torch

    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value
    return torch
