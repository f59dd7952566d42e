"""Values that all ranks must share. One rank alone needs no process group."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def from_rank_zero(values: Sequence[float], device: torch.device) -> list[float]:
    """Rank 0's values, on every rank. Collective; also a barrier."""
    if world_size() == 1:
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.broadcast(tensor, src=0)
    return tensor.tolist()


def most_over_ranks(value: int, device: torch.device) -> int:
    """The largest of each rank's value, on every rank. Collective."""
    if world_size() == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.int64, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)


def sum_over_ranks(value: float, device: torch.device) -> float:
    """The sum of each rank's value, on every rank. Collective."""
    if world_size() == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return float(tensor)


def from_all_ranks(text: str, device: torch.device) -> list[str]:
    """Each rank's text, on every rank; all are equally long, and plain ASCII. Collective."""
    if world_size() == 1:
        return [text]
    own = torch.tensor(list(text.encode("ascii")), dtype=torch.uint8, device=device)
    each = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(each, own)
    return [bytes(one.tolist()).decode("ascii") for one in each]
