"""Process groups of a DeepSpeed group of ranks."""

from __future__ import annotations

import importlib
import os
import socket
from datetime import timedelta

import torch.distributed as dist


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

    deepspeed.ops.__dict__["__compatible_ops__"] = {}
    compile, compiler.compile = compiler.compile, lambda: lambda function: function
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = compile


def join_group(*, rank: int, world_size: int, address: str, port: int, device_type: str, timeout_s: float) -> None:
    """Join the group of `world_size` ranks that meets at address:port (rank 0's host). Blocks until all are there."""
    os.environ.update(RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(world_size))
    prepare_deepspeed(device_type)
    import deepspeed

    backend = "gloo" if device_type == "cpu" else "nccl"
    meet(backend, rank, world_size, address, port, timeout_s)
    deepspeed.init_distributed(
        dist_backend=backend, auto_mpi_discovery=False, timeout=timedelta(seconds=timeout_s), verbose=False
    )


def meet(backend: str, rank: int, world_size: int, address: str, port: int, timeout_s: float) -> None:
    """Make torch's process group of the ranks that meet at address:port."""
    os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))
    timeout = timedelta(seconds=timeout_s)
    store = _store(rank, world_size, address, port, timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def _store(rank: int, world_size: int, address: str, port: int, timeout: timedelta) -> dist.Store:
    """Where the ranks meet. Torch's own would listen on every interface, and asks nobody for a password: this one listens on
    `address` alone, and where there is one rank not at all."""
    if world_size == 1:
        return dist.HashStore()
    if rank != 0:
        return dist.TCPStore(address, port, world_size, False, timeout)
    family, _, _, _, where = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(where)
    return dist.TCPStore(address, port, world_size, True, timeout, master_listen_fd=listener.detach())
