"""What the nodes of a run have: this machine, those of a cluster, or such as one would rent.   Memory in bytes."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rlhf_ray.actors.layout import Amounts
from rlhf_ray.errors import UserError

GIB = 2**30
ANSWER_S = 60.0
#: Of one GPU, by NVIDIA's data sheets; CPUs and memory per GPU as in its DGX machines (8 GPUs: 2 TB, 224 threads with H100, H200).
RENTED = {
    "A100-40": (40 * GIB, 32, 128e9), "A100": (80 * GIB, 32, 256e9), "H100": (80 * GIB, 28, 256e9), "H200": (141e9, 28, 256e9),
    "L40S": (48e9, 16, 96e9), "L4": (24e9, 12, 48e9), "A10G": (24e9, 12, 48e9),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Node:
    name: str
    amounts: Amounts  # as Ray counts them: "CPU", "GPU"
    memory: float | None  # None: not known
    gpu_memory: tuple[float, ...] = ()  # of each GPU; (): not known, or none


def this_machine() -> Node:
    """As a Ray that a run starts here has it."""
    gpus = local_gpus(os.environ.get("CUDA_VISIBLE_DEVICES"))
    return Node("this machine", {"CPU": float(len(os.sched_getaffinity(0))), "GPU": float(len(gpus))}, local_memory(), gpus)


def cluster_nodes() -> list[Node]:
    """Those of the cluster that this process is connected to. Each is asked by a task, which reserves nothing."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    ask = ray.remote(_what_is_here)
    asked = [
        ask.options(
            num_cpus=0, max_retries=1, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote()
        for node in alive
    ]
    answered, _ = ray.wait(asked, num_returns=len(asked), timeout=ANSWER_S)
    found: list[Node] = []
    for node, answer in zip(alive, asked, strict=True):
        memory, gpus = None, ()
        if answer in answered:
            with suppress(RayError):  # another check tells of a node that can't run anything
                memory, gpus = ray.get(answer, timeout=ANSWER_S)
        found.append(Node(f"node {node['NodeManagerAddress']}", node["Resources"], memory, tuple(gpus)))
    return found


def _what_is_here() -> tuple[float, tuple[float, ...]]:
    return local_memory(), local_gpus()


def local_memory() -> float:
    """Of this machine, or what its control group (a container) may use where that is less."""
    found = [float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))]
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # "max": none
            found.append(float(Path(limit).read_text()))
    return min(found)


def local_gpus(visible: str | None = None) -> tuple[float, ...]:
    """By the driver: nothing is reserved, and torch need not be imported. visible: as CUDA_VISIBLE_DEVICES has it."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    sizes = [float(line) * 2**20 for line in listed.split("\n") if line.strip().isdigit()]
    named = None if visible is None else [each.strip() for each in visible.split(",") if each.strip()]
    if named is None or not sizes:
        return tuple(sizes)
    return tuple(sizes[int(each)] if each.isdigit() and int(each) < len(sizes) else min(sizes) for each in named)


def rented_nodes(words: str) -> list[Node]:
    """words: NODESxGPUSxKIND, as in 2x8xH100. UserError for others."""
    found = re.fullmatch(r"(\d+)x(\d+)x([\w-]+)", words.strip())
    kind = RENTED.get(found[3].upper()) if found else None
    if found is None or kind is None or int(found[1]) < 1 or int(found[2]) < 1:
        raise UserError(
            f"--nodes {words!r} is not NODESxGPUSxKIND, such as 2x8xH100; the kinds of GPU are {', '.join(RENTED)}"
        )
    gpu, cpus, memory = kind
    count = int(found[2])
    amounts: Mapping[str, float] = {"CPU": float(cpus * count), "GPU": float(count)}
    return [Node(f"node {number}", amounts, memory * count, (float(gpu),) * count) for number in range(int(found[1]))]


def is_there(node: str) -> bool:
    """Whether the cluster still has it. node: Ray's id."""
    return any(each["Alive"] and each["NodeID"] == node for each in ray.nodes())
