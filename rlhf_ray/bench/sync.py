"""`rlhf-ray bench sync`: the weights' way from the policy to a generator, as PPO takes it, against a copy in memory.

Real actors: the policy actor packs its weights, they go through Ray's object store, the generation actor copies them into
its model. The yardstick is one thread that copies as many bytes from one numpy array to another.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from rlhf_ray.bench.flops import Shape, Work
from rlhf_ray.bench.random_run import bench_recipe, cores, write_random_run
from rlhf_ray.bench.results import hardware, in_brackets, on_hardware, ratios, show, spread
from rlhf_ray.config import Precision, RoleConfig
from rlhf_ray.runs.run_folder import RunFolder

VOCABULARY = 4096
WIDTHS = ((32, 256), (200, 512), (2000, 1024))  # up to this many million weights -> width


def shape_of_weights(count: float) -> Shape:
    """A GPT-2 of about this many weights."""
    width = next((width for limit, width in WIDTHS if count <= limit * 1e6), 2048)
    one = Shape(layers=1, width=width, heads=width // 64, vocabulary=VOCABULARY)
    layers = max(1, round((count - VOCABULARY * width) / one.block_weights))
    return Shape(layers=layers, width=width, heads=width // 64, vocabulary=VOCABULARY)


def measure_sync(megabytes: list[float], *, generators: int, repeats: int, precision: Precision) -> dict:
    """One row per size: seconds and GB/s of a sync, of a copy, and their ratio."""
    from rlhf_ray.actors.session import ray_session
    from rlhf_ray.training.precision import resolve_precision

    dtype = resolve_precision(precision, "cpu")
    largest = max(megabytes) * 1e6
    with ray_session(None, object_store_bytes=int(3 * largest) + (200 << 20)):
        sizes = [
            _one_size(shape_of_weights(size * 1e6 / dtype.itemsize), generators, repeats, precision)
            for size in megabytes
        ]
    return {"sizes": sizes, "generators": generators, "repeats": repeats, "dtype": str(dtype).removeprefix("torch."),
            "hardware": hardware()}  # fmt: skip


def _one_size(shape: Shape, generators: int, repeats: int, precision: Precision) -> dict:
    import ray

    from rlhf_ray.actors.calls import members
    from rlhf_ray.actors.groups import GenerationGroup, PolicyGroup
    from rlhf_ray.actors.role_actors import GenerationActor
    from rlhf_ray.actors.trainer_actors import PolicyActor
    from rlhf_ray.actors.wait import Waiter

    role = RoleConfig(cpus=0.1, threads=cores())
    work = Work(rows=1, prompt=8, response=8, epochs=1)
    recipe = bench_recipe(shape, work, microbatch=1, precision=precision, resources={})
    waiter = Waiter(600, "look at what else runs on this machine")
    with tempfile.TemporaryDirectory(prefix="rlhf_ray_bench_") as path:
        folder = RunFolder(Path(path))
        write_random_run(recipe, folder, prompts=1, length=8, reward=False)
        start = folder.stage("sft").model
        drawing = [
            GenerationActor.options(num_cpus=0.1).remote(f"generation-{number}", recipe, folder, role, start)
            for number in range(generators)
        ]
        training = PolicyActor.options(num_cpus=0.1).remote("policy-0", recipe, folder, recipe.resources.policy, 0, 1)
        try:
            policy = PolicyGroup(members("policy", [training]))
            (place,) = waiter.get(policy.call("address"), "start")
            (policy.weight_bytes,) = waiter.get(policy.call("join", start, *place), "start")
            roles = SimpleNamespace(
                policy=policy, generation=GenerationGroup(members("generation", drawing)), wait=waiter.wait, get=waiter.get
            )
            return _timed(roles, waiter, repeats) | {"weights": policy.weight_bytes // 4, "layers": shape.layers,
                                                    "width": shape.width}  # fmt: skip
        finally:
            for actor in (*drawing, training):
                ray.kill(cast(Any, actor))  # Ray annotates a handle as one or the actor's class


def _timed(roles, waiter, repeats: int) -> dict:
    """Syncs and copies in turn, after one of each to warm up."""
    from rlhf_ray.ppo.step import sync_weights

    seconds, packing, copies, moved = [], [], [], 0
    for version in range(repeats + 1):
        waiter.take_totals()
        started = time.perf_counter()
        sync_weights(roles, version)
        took, totals = time.perf_counter() - started, waiter.take_totals()
        moved = int(totals["bytes/policy_sync"])
        copied = copy_seconds(moved)
        if version > 0:
            seconds.append(took)
            packing.append(totals["busy/policy_sync_s"])
            copies.append(copied)
    return {
        "megabytes": moved / 1e6,
        "seconds": spread(seconds),
        "packing_s": spread(packing),
        "gb_per_s": spread([moved / each / 1e9 for each in seconds]),
        "copy_gb_per_s": spread([moved / each / 1e9 for each in copies]),
        "ratio": ratios([1 / each for each in seconds], [1 / each for each in copies]),
    }


def copy_seconds(size: int) -> float:
    """One thread's copy of `size` bytes into memory that was written before; the best of three."""
    import numpy as np

    source, target = np.ones(size, np.uint8), np.zeros(size, np.uint8)
    times = []
    for _ in range(3):
        started = time.perf_counter()
        np.copyto(target, source)
        times.append(time.perf_counter() - started)
    return min(times)


def show_sync(result: dict, *, as_json: bool) -> None:
    rows = [
        (f"{size['megabytes']:.0f}", f"{size['seconds']['median']:.3f}", f"{size['packing_s']['median']:.3f}",
         f"{size['gb_per_s']['median']:.2f}", f"{size['copy_gb_per_s']['median']:.1f}", in_brackets(size["ratio"], 3))
        for size in result["sizes"]
    ]  # fmt: skip
    lines = [
        f"{result['dtype']}, one policy rank, {result['generators']} generation actor(s), {result['repeats']} repeats, each "
        f"followed by its copy ({on_hardware(result)})"
    ]
    show(result, lines, as_json=as_json, rows=rows,
         columns=("MB", "seconds", "of it packing", "GB/s", "copy GB/s", "ratio to the copy"))  # fmt: skip
