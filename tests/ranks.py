"""Ranks that a test starts itself, without Ray: forks of one process, which imports all that they need once per test run."""

import multiprocessing
import os
import socket
import tempfile
from pathlib import Path

import torch

from rlhf_ray.config import Recipe
from rlhf_ray.runs.run_folder import RunFolder

IMPORTED = ("rlhf_ray.training.deepspeed_engine", "rlhf_ray.training.forward", "rlhf_ray.supervised.sft",
            "rlhf_ray.supervised.reward_model", "rlhf_ray.supervised.dpo", "transformers.models.gpt2.modeling_gpt2",
            "transformers.models.llama.modeling_llama")  # fmt: skip


def on_ranks(work, world, *arguments):
    """[what work(rank, world, *arguments) returns, for each rank of a group of `world`]. An error of one is raised here."""
    multiprocessing.set_forkserver_preload(list(IMPORTED))
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(
            _rank, args=(work, world, free_port(), Path(folder), arguments), nprocs=world, start_method="forkserver"
        )
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _rank(rank, work, world, port, folder, arguments):
    from rlhf_ray.training.distributed import join_group

    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # as Ray tells its workers: else Accelerate takes all cores, and a sum's bits are theirs
    join_group(rank=rank, world_size=world, address="127.0.0.1", port=port, device_type="cpu", timeout_s=120)
    torch.save(work(rank, world, *arguments), folder / f"{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def clones(named):
    """{name: a copy} of (name, tensor) pairs."""
    return {name: tensor.detach().clone() for name, tensor in named}


def gap(one, other):
    """The largest difference of two {name: tensor}."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def train(*jobs, world=1):
    """Supervised stages as a worker of Ray Train runs them. Each job is (recipe, run folder, stages): all in order, in the same
    processes, one per rank."""
    values = [(recipe.model_dump(mode="json"), run.path, stages) for recipe, run, stages in jobs]
    on_ranks(_train, world, values)


def _train(rank, world, jobs):
    os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    from rlhf_ray.supervised.dpo import train_dpo
    from rlhf_ray.supervised.reward_model import train_reward
    from rlhf_ray.supervised.sft import train_sft

    trainers = {"sft": train_sft, "reward": train_reward, "judge": train_reward, "dpo": train_dpo}
    for values, path, stages in jobs:
        recipe, run = Recipe.model_validate(values), RunFolder(path)
        for stage in stages:
            run.stage(stage).path.mkdir(parents=True, exist_ok=True)
            summary = trainers[stage](recipe, run, stage)
            if rank == 0 and summary["ended_by"] != "stop":
                run.stage(stage).finish(summary)
