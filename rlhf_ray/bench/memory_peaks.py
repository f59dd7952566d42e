"""The memory plan against what real processes take on a CPU, set-up by set-up.

    python -m rlhf_ray.bench.memory_peaks [SET-UP ...]       measure (all of them), print a table, write results/bench/memory.json

Each rank of a set-up is a process of its own that does what its Ray actor or stage worker does, without Ray: it loads its model
from a run folder, joins the DeepSpeed group, works on rows of the longest length, and takes its optimiser steps. Told is the peak
of resident memory over that of the same process when all was imported, no model loaded.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf_ray.bench.memory_setups import SETUPS, SetUp
from rlhf_ray.config import Recipe

RESULTS = Path(__file__).resolve().parents[2] / "results" / "bench" / "memory.json"  # MB of each phase, by set-up


def planned(name: str, *, written: bool = True) -> float:
    """Peak bytes of a rank, by the plan. written: while copies for checkpoints and the model's own folder are written, too."""
    from rlhf_ray.models.memory import memory_plan
    from rlhf_ray.models.stage_memory import stage_memory_plan

    setup = SETUPS[name]
    recipe, itemsize = setup.recipe(), 2 if setup.precision == "bfloat16" else 4
    if setup.trains_alone:
        rows = stage_memory_plan(recipe, dict.fromkeys(recipe.trained, itemsize))
        process = next(row.process for row in rows if row.stage == setup.process)
    else:
        process = next(row.process for row in memory_plan(recipe, itemsize=itemsize) if row.role == setup.process)
    return (process if written else replace(process, host={}, moments={})).peak


def resident(what: str) -> int:
    """Bytes: VmRSS now, or VmHWM, the most since `forget_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what):
            return int(line.split()[1]) * 1024
    raise AssertionError(what)


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measure(name: str, rank: int, port: int, folder: Path) -> None:
    """In a process of its own: write peak bytes of each phase to FOLDER/measured/NAME-RANK.json."""
    setup = SETUPS[name]
    recipe = setup.recipe()
    phases = _stage_phases if setup.trains_alone else _role_phases
    found = phases(setup, recipe, rank, port, folder)
    (folder / f"measured-{rank}.json").write_text(json.dumps(found))


def _role_phases(setup: SetUp, recipe: Recipe, rank: int, port: int, folder: Path) -> dict[str, int]:
    from rlhf_ray.runs.run_folder import RunFolder

    kind, run = _imported(setup), RunFolder(folder / "run")
    rollout, shard = _rows(setup, recipe, rank)
    trains, start = setup.process in ("policy", "critic"), run.stage("sft").model
    base, peaks = resident("VmRSS"), {}
    forget_peak()

    def phase(name: str) -> None:
        peaks[name] = resident("VmHWM") - base
        forget_peak()

    args = (rank, setup.ranks) if trains else (start,)
    actor = kind(f"{setup.process}-{rank}", recipe, run, recipe.resources.roles[setup.process], *args)
    if trains:
        actor.join(start, "127.0.0.1", port)
    phase("start")
    if setup.process == "generation":
        _generate(actor, recipe, phase)
        return peaks
    (actor.role.values if setup.process == "critic" else actor.role.logprobs)(rollout)
    phase("forward")
    if trains:
        for _ in range(2):
            actor.role.update(shard, 1e-5, *((0.0,) if setup.process == "policy" else ()))
        phase("update")
        _save(actor, shard, setup, phase)
    if setup.process == "policy":
        _send(actor)
        phase("sync")
        actor.save_model(folder / "written", "", None)
        phase("model written")
    return peaks


def _save(actor: Any, shard: Any, setup: SetUp, phase: Callable[[str], None]) -> None:
    """A checkpoint's copy stands all through the next update, as if the disk were slow."""
    waiting = []
    actor.writing.begin = waiting.append
    (target := actor.folder.path / "checkpoint").mkdir(exist_ok=True)
    actor.save(target)
    actor.role.update(shard, 1e-5, *((0.0,) if setup.process == "policy" else ()))
    phase("update beside a checkpoint")
    actor.snapshot()
    phase("snapshot")


def _imported(setup: SetUp) -> Any:
    """The class of the actor, and all that it imports when it starts."""
    import importlib

    import torch

    from rlhf_ray.actors import role_actors, trainer_actors
    from rlhf_ray.training.distributed import prepare_deepspeed

    torch.set_num_threads(1)
    if setup.process in ("policy", "critic"):
        importlib.import_module("rlhf_ray.training.deepspeed_engine")
        prepare_deepspeed("cpu")
    families = [f"transformers.models.{name}.modeling_{name}" for name in ("gpt2", "llama", "qwen2")]
    for module in ("roles.trainer", "models.load", "roles.generator", "roles.reference_policy"):
        importlib.import_module(f"rlhf_ray.{module}")
    for module in families:
        importlib.import_module(module)
    torch.mm(torch.randn(64, 64), torch.randn(64, 64))
    kinds: dict[str, Any] = {
        "policy": trainer_actors.PolicyActor, "critic": trainer_actors.CriticActor, "generation": role_actors.GenerationActor,
        "reference": role_actors.ReferenceActor,
    }  # fmt: skip
    return kinds[setup.process].__ray_metadata__.modified_class


def _rows(setup: SetUp, recipe: Recipe, rank: int) -> tuple[Any, Any]:
    """(a rollout of all rows; this rank's shard of them): 128 + 128 tokens each."""
    import numpy as np

    from rlhf_ray.messages import Chunk, CriticShard, OptimiserStep, PolicyShard, RolloutBatch, Sequences

    draws, rows, vocabulary = np.random.default_rng(0), recipe.ppo.rollouts_per_step, recipe.model.from_scratch.vocab_size
    chunk = Chunk(step=0, index=0, prompt_indices=tuple(range(rows)), sample_indices=(0,) * rows)
    prompts, responses = ([draws.integers(0, vocabulary - 2, length) for _ in range(rows)] for length in (128, 128))
    sequences = Sequences.of(prompts, responses)
    floats = draws.normal(size=rows * 128).astype(np.float32)
    rollout = RolloutBatch(chunk=chunk, policy_version=0, sequences=sequences, rollout_logprobs=floats, ended=np.ones(rows, bool))
    mine = sequences.rows(range(rank, rows, setup.ranks))
    own = floats[: len(mine.response_ids)]
    step = OptimiserStep(rows=np.arange(rows // setup.ranks), num_tokens=rows * 128, num_sequences=rows)
    common = {"step": 0, "sequences": mine, "schedule": (step,) * recipe.ppo.ppo_epochs}
    if setup.process == "critic":
        return rollout, CriticShard(**common, old_values=own, returns=own)
    return rollout, PolicyShard(**common, old_logprobs=own - 9.0, advantages=own)


def _generate(actor: Any, recipe: Recipe, phase: Callable[[str], None]) -> None:
    import torch

    from rlhf_ray.messages import Chunk

    size = recipe.generation.chunk_size
    chunk = Chunk(step=0, index=0, prompt_indices=tuple(range(size)), sample_indices=(0,) * size)
    actor.role.generate(chunk)
    phase("generate")
    weights = actor.role.engine.model.state_dict()  # sent without a copy, as they lie in the object store
    actor.role.load_weights(
        {name: (each.view(torch.int16) if each.itemsize == 2 else each).numpy() for name, each in weights.items()}, 1
    )
    actor.role.generate(chunk)
    phase("after a sync")


def _send(actor: Any) -> None:
    import torch

    from rlhf_ray.models.wire import pack_weights

    pack_weights(actor.role.weights(), 1, torch.float32)


def _stage_phases(setup: SetUp, recipe: Recipe, rank: int, port: int, folder: Path) -> dict[str, int]:
    os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}
    import torch

    from rlhf_ray.runs.run_folder import RunFolder
    from rlhf_ray.training.distributed import join_group

    torch.set_num_threads(1)
    join_group(rank=rank, world_size=setup.ranks, address="127.0.0.1", port=port, device_type="cpu", timeout_s=600)
    import transformers.models.gpt2.modeling_gpt2
    import transformers.models.llama.modeling_llama  # noqa: F401

    import rlhf_ray.supervised.reward_model
    import rlhf_ray.supervised.sft  # noqa: F401
    from rlhf_ray.supervised import stage as module

    run = RunFolder(folder / "stage")
    torch.mm(torch.randn(64, 64), torch.randn(64, 64))
    base = resident("VmRSS")
    forget_peak()
    peaks = {}
    plain = module.trained_weights

    def trained(trainer):
        peaks["training"] = resident("VmHWM") - base
        forget_peak()
        return plain(trainer)

    module.trained_weights = trained
    train = {"sft": rlhf_ray.supervised.sft.train_sft, "reward": rlhf_ray.supervised.reward_model.train_reward}[setup.process]
    run.stage(setup.process).path.mkdir(parents=True, exist_ok=True)
    train(recipe, run, setup.process)
    return peaks


def prepare(setup: SetUp, folder: Path) -> None:
    """The run folder that the processes find: models, prompts, data."""
    from rlhf_ray.bench.random_run import write_random_run
    from rlhf_ray.data.role_files import write_role
    from rlhf_ray.models.tokenizer import word_tokenizer
    from rlhf_ray.runs.run_folder import RunFolder

    recipe = setup.recipe()
    if not setup.trains_alone:
        reward = setup.process == "critic"
        count = recipe.generation.chunk_size
        write_random_run(recipe, RunFolder(folder / "run"), prompts=count, length=setup.prompt, reward=reward)
        return
    run, size = RunFolder(folder / "stage"), recipe.model.from_scratch.vocab_size
    tokenizer = word_tokenizer(size)
    run.tokenizer.mkdir(parents=True)
    tokenizer.save_pretrained(run.tokenizer)
    half = " ".join(f"t{number}" for number in range(127))
    whole = {"prompt": "", "response": f"{half} {half}"}  # all of its tokens train
    write_role(run, "sft_train", [whole for _ in range(64)], ("prompt", "response"))
    if setup.process == "reward":
        from rlhf_ray.models.load import build_causal_lm
        from rlhf_ray.models.save import save_model

        rows = [{"prompt": half, "response": half, "score": float(number % 2)} for number in range(64)]
        write_role(run, "reward_train", rows, ("prompt", "response", "score"))
        run.stage("sft").path.mkdir(parents=True)
        save_model(build_causal_lm(recipe.model, tokenizer, 0), tokenizer, run.stage("sft").model, "Random weights.\n")


def measured(name: str) -> dict[str, int]:
    """Peak bytes of each phase, the largest of the ranks, of a fresh run of the set-up."""
    setup = SETUPS[name]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(setup, folder)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", "rlhf_ray.bench.memory_peaks", "--process", name, str(port), temporary]
        environment = os.environ | {"OMP_WAIT_POLICY": "passive", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
        processes = [
            subprocess.Popen([*command, str(rank)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            for rank in range(setup.ranks)
        ]
        for process in processes:
            output, _ = process.communicate()
            if process.returncode:
                logs = "".join(path.read_text() for path in folder.rglob("*.log"))
                raise RuntimeError(f"{name} failed:\n{output.decode()}\n{logs}")
        each = [json.loads((folder / f"measured-{rank}.json").read_text()) for rank in range(setup.ranks)]
    return {phase: max(rank[phase] for rank in each if phase in rank) for phase in each[0]}


def main() -> None:
    if sys.argv[1:2] == ["--process"]:
        name, port, folder, rank = sys.argv[2:]
        measure(name, int(rank), int(port), Path(folder))
        return
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in sys.argv[1:] or SETUPS:
        phases = measured(name)
        kept[name] = {phase: round(value / 1e6, 1) for phase, value in phases.items()}
        RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
        peak, plan = max(phases.values()) / 1e6, planned(name) / 1e6
        print(f"{name:22} {peak:7.0f} MB measured, {plan:7.0f} MB planned, {plan / peak - 1:+.0%}", flush=True)


if __name__ == "__main__":
    main()
