"""`rlhf-ray bench ppo`: whole PPO iterations over the real actors, on random prompts of a fixed length.

Yardsticks: the iteration's arithmetic at the matmul rate of the same machine, and TRL's PPOTrainer if asked for.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from rlhf_ray.bench.flops import Shape, Work, computed, peak_shares, phases
from rlhf_ray.bench.matmul import matmul_rate
from rlhf_ray.bench.random_run import bench_recipe, cores, write_random_run
from rlhf_ray.bench.results import hardware, on_hardware, show
from rlhf_ray.bench.yardsticks.pss import tree_pss
from rlhf_ray.config import Precision
from rlhf_ray.runs.run_folder import RunFolder

PHASES = ("generate", "score", "assemble", "update", "sync")


def measure_ppo(
    shape: Shape, work: Work, *, microbatch: int, iterations: int, threads: int, precision: Precision, gpu: bool = False
) -> dict:
    """Time `iterations` iterations after one to warm up, and the machine's matmul rate before and after them."""
    threads = threads or cores()
    recipe = bench_recipe(shape, work, microbatch=microbatch, precision=precision, resources=_resources(threads, gpu))
    rows = recipe.ppo.microbatch_size
    rate = {"shape": shape, "tokens": rows * (work.prompt + work.response), "logits": rows * work.response,
            "device": "cuda" if gpu else "cpu"}  # fmt: skip
    peaks = [matmul_rate(**rate, threads=threads)]
    start_s, runs, pss = _run(recipe, work, iterations)
    peaks.append(matmul_rate(**rate, threads=threads))
    peak = max(peaks, key=lambda found: found["flop_per_s"])
    seconds = statistics.median(run["seconds"] for run in runs)
    of_phases = {phase: statistics.median(run[f"time/{phase}_s"] for run in runs) for phase in PHASES}
    return {
        "samples_per_s": work.rows / seconds,
        "iteration_s": [round(run["seconds"], 4) for run in runs],
        "seconds_per_phase": of_phases,
        "matmul": peak,
        "floor": [asdict(row) for row in peak_shares(of_phases, phases(shape, work), peak["flop_per_s"])],
        "computed": [asdict(row) for row in peak_shares(of_phases, computed(shape, work), peak["flop_per_s"])],
        "waiting": _waiting(runs),
        "response_tokens": statistics.mean(run["rollout/tokens"] for run in runs) / work.rows,
        "mismatch_max": max(run["policy/mismatch_max"] for run in runs),
        "start_s": start_s,
        "pss_gb": pss,
        "work": {"layers": shape.layers, "width": shape.width, "heads": shape.heads, "vocabulary": shape.vocabulary,
                 "prompts": work.rows, "prompt_tokens": work.prompt, "response_tokens": work.response,
                 "ppo_epochs": work.epochs, "minibatches": 1, "precision": precision,
                 "key_value_heads": shape.key_value_heads, "lora_rank": work.lora_rank},
        "hardware": hardware(),
    }  # fmt: skip


def _run(recipe, work: Work, iterations: int) -> tuple[float, list[dict], float | None]:
    """(seconds to start, metrics of each iteration but the first, memory at the end of them in GB)."""
    from rlhf_ray.actors.ppo_stage import ray_roles
    from rlhf_ray.actors.session import OBJECT_STORE_BYTES, ray_session
    from rlhf_ray.actors.wait import Waiter
    from rlhf_ray.models.size import parameters
    from rlhf_ray.ppo.step import StepConfig, cut_chunks, ppo_step, sync_weights

    with tempfile.TemporaryDirectory(prefix="rlhf_ray_bench_") as path:
        folder = RunFolder(Path(path))
        write_random_run(recipe, folder, prompts=work.rows, length=work.prompt)
        waiter = Waiter(1800, "look at what else runs on this machine")
        store = max(OBJECT_STORE_BYTES, 12 * parameters(recipe))  # two versions of the weights in float32, and rollouts
        started = time.perf_counter()
        with ray_session(None, object_store_bytes=store), ray_roles(recipe, folder, waiter) as roles:
            sync_weights(roles, 0)
            start_s = time.perf_counter() - started
            runs = []
            for step in range(iterations + 1):
                chunks = cut_chunks(step, range(work.rows), 1, work.rows)
                config = StepConfig(
                    step=step, kl_coef=0.05, learning_rate=1e-5, critic_learning_rate=1e-5,
                    max_mismatch=100.0, max_mismatch_kl=100.0, max_first_approx_kl=1.0,
                )  # fmt: skip
                began = time.perf_counter()
                metrics = ppo_step(roles, chunks, config)
                runs.append(metrics | {"seconds": time.perf_counter() - began} | waiter.take_totals())
            pss = tree_pss(os.getpid())
    return start_s, runs[1:], pss and pss / 1e9


def _waiting(runs: list[dict]) -> dict[str, float]:
    """By phase: the share of an iteration in which even its slowest role does not compute, but Ray serialises, schedules and
    stores, or the controller waits. All of the sync counts: packing is not computing. Median over the iterations. For one
    actor per role: the accounts add up over actors."""
    roles = {"generate": ("generation",), "score": ("reward", "reference", "policy", "critic"), "assemble": ("experience",),
             "update": ("policy_update", "critic_update"), "sync": ()}  # fmt: skip
    shares = [
        {phase: (run[f"time/{phase}_s"] - max((run[f"busy/{role}_s"] for role in of), default=0)) / run["seconds"]
         for phase, of in roles.items()}
        for run in runs
    ]  # fmt: skip
    return {phase: statistics.median(share[phase] for share in shares) for phase in roles} | {
        "iteration": statistics.median(sum(share.values()) for share in shares)
    }


def _resources(threads: int, gpu: bool) -> dict:
    """Generation has the machine to itself; the others share the cores: two score side by side, then two train.

    gpu: all five share one GPU.
    """
    share = {"cpus": 0.1} | ({"gpus": 0.2} if gpu else {})
    roles = dict.fromkeys(("reward", "reference", "policy", "critic"), share | {"threads": max(1, threads // 2)})
    return {"generation": share | {"threads": threads}, **roles}


def show_ppo(result: dict, *, as_json: bool) -> None:
    total = sum(result["seconds_per_phase"].values())
    rows = [
        (row["phase"], f"{row['seconds']:.3f}", f"{row['seconds'] / total:.0%}", f"{row['flop'] / 1e9:,.0f}",
         f"{row['peak_share']:.0%}" if row["flop"] else "-")
        for row in result["floor"]
    ]  # fmt: skip
    peak = result["matmul"]
    lines = [
        f"[bold]{result['samples_per_s']:.1f} samples per second[/] (median of {len(result['iteration_s'])} iterations, "
        f"start-up {result['start_s']:.0f} s, {on_hardware(result)})",
        f"peak: {peak['flop_per_s'] / 1e9:,.0f} GFLOP/s, {peak['dtype']} products of this model's shapes on "
        + (f"{peak['threads']} threads" if peak["device"] == "cpu" else "the GPU"),
    ]
    done, waiting = result["computed"][-1], result["waiting"]["iteration"]
    lines += [
        f"of these are needed: {done['flop'] / 1e9:,.0f} GFLOP, {done['peak_share']:.0%} of peak (the first epoch's forward pass "
        "is there already, the last feed-forward works where it is read)",
        f"Ray's share: {waiting:.1%} of an iteration beyond the slowest role's computing, weight sync included",
    ]
    if result["pss_gb"] is not None:
        lines.append(f"memory of all processes together: {result['pss_gb']:.2f} GB (proportional set size)")
    if "trl" in result:
        lines += [f"TRL's PPOTrainer, {run['precision']}: {run['samples_per_s']:.1f} samples per second, {run['pss_gb']:.2f} GB"
                  for run in result["trl"]["runs"]]  # fmt: skip
        lines += [f"[bold]{result['trl']['ratio']:.2f} times TRL's better precision[/]"]
    show(result, lines, as_json=as_json, columns=("phase", "seconds", "share", "GFLOP", "of peak"), rows=rows)
