"""Supervised stages on ranks that this process starts, without Ray: what a worker of Ray Train calls."""

import os
import socket

import torch

from rlhf_ray.config import Recipe
from rlhf_ray.runs.run_folder import RunFolder


def train(*jobs, world=1):
    """Each job is (recipe, run folder, stages): all in order, in the same processes, one per rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    values = [(recipe.model_dump(mode="json"), run.path, stages) for recipe, run, stages in jobs]
    torch.multiprocessing.spawn(_work, args=(world, port, values), nprocs=world)


def _work(rank, world, port, jobs):
    os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    torch.set_num_threads(1)
    from rlhf_ray.supervised.dpo import train_dpo
    from rlhf_ray.supervised.reward_model import train_reward
    from rlhf_ray.supervised.sft import train_sft
    from rlhf_ray.training.distributed import join_group

    join_group(rank=rank, world_size=world, address="127.0.0.1", port=port, device_type="cpu", timeout_s=120)
    trainers = {"sft": train_sft, "reward": train_reward, "judge": train_reward, "dpo": train_dpo}
    for values, path, stages in jobs:
        recipe, run = Recipe.model_validate(values), RunFolder(path)
        for stage in stages:
            run.stage(stage).path.mkdir(parents=True, exist_ok=True)
            summary = trainers[stage](recipe, run, stage)
            if rank == 0 and summary["ended_by"] != "stop":
                run.stage(stage).finish(summary)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
