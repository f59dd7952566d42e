"""`rlhf-ray bench ppo`: whole PPO iterations over the real actors, on random prompts of a fixed length."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rlhf_ray.config import Recipe
from rlhf_ray.pipeline import environment
from rlhf_ray.run_folder import RunFolder

PHASES = ("generate", "score", "assemble", "update", "sync")


def measure_ppo(
    *,
    layers: int,
    width: int,
    heads: int,
    vocab: int,
    batch: int,
    prompt: int,
    response: int,
    epochs: int,
    microbatch: int,
    iterations: int,
    threads: int,
    precision: str,
) -> dict:
    """Time `iterations` iterations after one to warm up. Responses have exactly `response` tokens: none ends early."""
    from rlhf_ray.actors.ppo_stage import ray_roles
    from rlhf_ray.actors.session import ray_session
    from rlhf_ray.actors.wait import Waiter
    from rlhf_ray.loop import StepKnobs, cut_units, ppo_step, sync_weights

    recipe = Recipe.model_validate({
        "name": "bench",
        "model": {"from_scratch": {"layers": layers, "width": width, "heads": heads, "vocab_size": vocab, "positions": 512}},
        "data": {"max_prompt_tokens": prompt},
        "generation": {"max_new_tokens": response, "chunk_size": batch},
        "ppo": {"rollout_batch_size": batch, "minibatch_size": batch, "microbatch_size": min(microbatch, batch),
                "ppo_epochs": epochs, "precision": precision, "max_mismatch": 100.0, "reuse_forward": True},
        "resources": _resources(threads),
    })  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="rlhf_ray_bench_") as path:
        folder = RunFolder(Path(path))
        write_random_run(recipe, folder, prompts=batch, length=prompt)
        waiter = Waiter(600, "look at what else runs on this machine")
        started = time.perf_counter()
        with ray_session(None), ray_roles(recipe, folder, waiter) as roles:
            sync_weights(roles, 0)
            start_s = time.perf_counter() - started
            runs = []
            for step in range(iterations + 1):
                units = cut_units(step, range(batch), 1, batch)
                began = time.perf_counter()
                metrics = ppo_step(
                    roles,
                    units,
                    StepKnobs(
                        step=step,
                        kl_coef=0.05,
                        learning_rate=1e-5,
                        critic_learning_rate=1e-5,
                        max_mismatch=100.0,
                        max_first_approx_kl=1.0,
                    ),
                )
                runs.append(metrics | {"seconds": time.perf_counter() - began} | waiter.take_totals())
    runs = runs[1:]
    seconds = statistics.median(run["seconds"] for run in runs)
    return {
        "samples_per_s": batch / seconds,
        "iteration_s": [round(run["seconds"], 4) for run in runs],
        "seconds_per_phase": {phase: statistics.median(run[f"time/{phase}_s"] for run in runs) for phase in PHASES},
        "response_tokens": statistics.mean(run["rollout/tokens"] for run in runs) / batch,
        "mismatch_max": max(run["policy/mismatch_max"] for run in runs),
        "start_s": start_s,
        "work": {"layers": layers, "width": width, "heads": heads, "vocabulary": vocab, "prompts": batch, "prompt_tokens": prompt,
                 "response_tokens": response, "ppo_epochs": epochs, "minibatches": 1, "precision": precision},
        "hardware": {key: value for key, value in environment().items() if key in ("cpu", "cpus", "memory_gb", "gpus", "versions")},
    }  # fmt: skip


def _resources(threads: int) -> dict:
    """Generation has the machine to itself; the others share the cores: two and two score and train side by side."""
    cores = len(os.sched_getaffinity(0))
    all_cores, half = threads or cores, max(1, (threads or cores) // 2)
    shared = {"cpus": 0.1, "threads": half}
    return {"generation": {"cpus": 0.1, "threads": all_cores}, "reward": shared, "reference": shared, "policy": shared,
            "critic": shared}  # fmt: skip


def write_random_run(recipe: Recipe, folder: RunFolder, *, prompts: int, length: int) -> None:
    """A run folder with a random policy, a random reward model and prompts of exactly `length` tokens."""
    import torch

    from rlhf_ray.data.store import write_role
    from rlhf_ray.models.load import build_causal_lm, build_reward_model, save_model
    from rlhf_ray.models.tokenizer import word_tokenizer

    tokenizer = word_tokenizer(recipe.model.from_scratch.vocab_size)
    model = build_causal_lm(recipe.model, tokenizer, recipe.seed)
    with torch.no_grad():  # EOS is out of reach: its row of the (tied) head points away from every state
        model.get_input_embeddings().weight[tokenizer.eos_token_id] = 0.0
    reward = build_reward_model(model, tokenizer, recipe.seed)
    for stage, saved in (("sft", model), ("reward", reward)):
        folder.stage(stage).path.mkdir(parents=True)
        save_model(saved, tokenizer, folder.stage(stage).model, "Random weights, for benchmarks.\n")
    generator = torch.Generator().manual_seed(recipe.seed)
    ids = torch.randint(0, recipe.model.from_scratch.vocab_size - 2, (prompts, length), generator=generator).tolist()
    rows = [{"prompt": " ".join(f"t{token}" for token in row)} for row in ids]
    for role in ("prompts", "eval_prompts"):
        write_role(folder, role, rows, ("prompt",))


def show(result: dict, console: Console, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(result))
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("phase")
    table.add_column("seconds", justify="right")
    table.add_column("share", justify="right")
    total = sum(result["seconds_per_phase"].values())
    for phase, seconds in result["seconds_per_phase"].items():
        table.add_row(phase, f"{seconds:.3f}", f"{seconds / total:.0%}")
    console.print(table)
    console.print(
        f"[bold]{result['samples_per_s']:.1f} samples a second[/] (median of {len(result['iteration_s'])} iterations, "
        f"start-up {result['start_s']:.0f} s, {result['hardware']['cpus']} cores of {result['hardware']['cpu']})",
        highlight=False,
    )
