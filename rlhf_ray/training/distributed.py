"""Process groups of a DeepSpeed group of ranks."""

from __future__ import annotations

import importlib
import os
from datetime import timedelta


def prepare_deepspeed(device_type: str) -> None:
    """Set what DeepSpeed reads at import: the accelerator, and that none of its own operators can be built.

    Nothing here uses one. DeepSpeed would try them all with g++ and nvcc at the first question for any, and on CPUs compile its
    shared-memory all-reduce, about a minute; gloo does the same work without it. Importing deepspeed here, in one place, keeps the
    answer ahead of every process group.

    Its ZeRO stages import the Muon optimiser, which nothing here uses, and whose functions ask for torch's compiler: importing
    that takes 4 s of each rank's start. So Muon is imported here, not compiled.
    """
    os.environ["DS_ACCELERATOR"] = "cpu" if device_type == "cpu" else "cuda"
    import deepspeed
    from deepspeed.runtime import compiler

    deepspeed.ops.__compatible_ops__ = {}
    compile, compiler.compile = compiler.compile, lambda: lambda function: function
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = compile


def join_group(*, rank: int, world_size: int, address: str, port: int, device_type: str, timeout_s: float) -> None:
    """Join the group of `world_size` ranks that meets at address:port (rank 0's host). Blocks until all are there."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(world_size), MASTER_ADDR=address, MASTER_PORT=str(port)
    )
    prepare_deepspeed(device_type)
    import deepspeed

    deepspeed.init_distributed(
        dist_backend="gloo" if device_type == "cpu" else "nccl",
        auto_mpi_discovery=False,
        timeout=timedelta(seconds=timeout_s),
        verbose=False,
    )
