"""The policy's weights to the generators by one broadcast, device to device: NCCL between GPUs, Gloo between CPUs.

A policy that waits for the generators sends its weights as they are (`send`); one that trains on meanwhile sends a copy from the
host's memory (`training.staged_weights`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from math import prod
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import distributed

from rlhf_ray.errors import RunFailed

if TYPE_CHECKING:
    from rlhf_ray.training.staged_weights import StagedWeights

BUCKET_BYTES = 64 * 1024**2  # small tensors travel together; the sender holds one such buffer at a time
Layout = Sequence[tuple[str, tuple[int, ...]]]  # names and shapes, in the order in which they are sent


class WeightChannel:
    """A process group beside any other of the process: rank 0 sends, the others receive. Calls are collective.

    Not torch's default group, which is that of the DeepSpeed ranks. NCCL wants a GPU of its own for each member. Blocks until
    all `size` members met at address:port (rank 0's host), `timeout_s` at most, as does each transfer; then RunFailed.
    """

    def __init__(self, *, rank: int, size: int, address: str, port: int, device: torch.device, timeout_s: float):
        self.rank, self.size, self.device, self.timeout_s = rank, size, device, timeout_s
        self.moved = 0  # versions
        timeout = timedelta(seconds=timeout_s)
        self.group: Any  # torch's annotations of a backend have no broadcast
        with self._in_words("did not meet"):
            # The store may outlive rank 0's part of the group: whoever is last to leave must still find it.
            store = distributed.TCPStore(address, port, size, rank == 0, timeout, wait_for_workers=True)
            if device.type == "cuda":
                options = distributed.ProcessGroupNCCL.Options()
                options._timeout = timeout
                self.group = distributed.ProcessGroupNCCL(store, rank, size, options)
            else:
                self.group = distributed.ProcessGroupGloo(store, rank, size, timeout)
            # A connection of its own: one that waits is closed to others. torch's annotations do not have it.
            self.store = cast(Any, store).clone()

    @torch.no_grad()
    def send(self, weights: Iterable[tuple[str, torch.Tensor]], layout: Layout, dtype: torch.dtype) -> int:
        """Rank 0: the weights of `layout`, cast to `dtype`. Each is let go as soon as its bucket is sent; returns the bytes."""
        self._meet()
        sizes = dict(layout)
        buckets, sent, filled = iter(cut(layout, dtype)), 0, []
        names = next(buckets, [])
        for name, weight in weights:
            assert name == names[len(filled)] and tuple(weight.shape) == sizes[name], "not the weights of the layout"
            filled.append(weight.detach().to(self.device, dtype).reshape(-1))
            if len(filled) == len(names):
                flat = torch.cat(filled)
                self._broadcast(flat)
                sent, filled, names = sent + flat.nbytes, [], next(buckets, [])
        assert not filled and not names, "weights of the layout are missing"
        return sent

    def send_staged(self, staged: StagedWeights) -> int:
        """Rank 0, in a thread of its own: what was staged, which is free for the next version afterwards. Returns the bytes."""
        self._meet()
        with self.aside(), torch.no_grad(), staged.being_sent() as buckets:
            for flat in buckets:
                self._broadcast(flat.to(self.device, non_blocking=True))
        return sum(flat.nbytes for flat in buckets)

    @torch.no_grad()
    def receive(self, layout: Layout, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        """The others: (name, weight) in the layout's order, each bucket in a buffer of its own."""
        self._meet()
        shapes = dict(layout)
        for names in cut(layout, dtype):
            sizes = [prod(shapes[name]) for name in names]
            flat = torch.empty(sum(sizes), dtype=dtype, device=self.device)
            self._broadcast(flat)
            for name, part in zip(names, flat.split(sizes), strict=True):
                yield name, part.view(shapes[name])

    def aside(self) -> AbstractContextManager[Any]:
        """In whose body a GPU moves weights beside what another thread computes."""
        return torch.cuda.stream(torch.cuda.Stream(self.device)) if self.device.type == "cuda" else nullcontext()

    def _meet(self) -> None:
        """Until all members are ready for the next version: a broadcast that waits for one keeps a GPU busy, this does not."""
        before, self.moved = self.moved, self.moved + 1
        with self._in_words("did not move weights"):
            self.store.set(f"{self.moved}/{self.rank}", "")
            everyone = [f"{self.moved}/{rank}" for rank in range(self.size)]
            self.store.wait(everyone, timedelta(seconds=self.timeout_s))
            self.store.delete_key(f"{before}/{self.rank}")  # all have seen it, as they are here

    def _broadcast(self, flat: torch.Tensor) -> None:
        with self._in_words("did not move weights"):
            options = distributed.BroadcastOptions()
            options.rootRank = 0
            self.group.broadcast([flat.view(torch.uint8)], options).wait()  # bits, which any backend moves
            if self.device.type == "cuda":
                torch.cuda.current_stream(
                    self.device
                ).synchronize()  # NCCL's wait is one of the stream, not of this process

    @contextmanager
    def _in_words(self, what: str) -> Iterator[None]:
        """Says what torch's errors of a group mean: DistBackendError, DistStoreError and plain RuntimeErrors."""
        try:
            yield
        except RuntimeError as error:
            raise RunFailed(
                f"policy and generation actors {what} within {self.timeout_s:g} s (member {self.rank} of their group); look in "
                "the run folder's logs/ of both, or set resources.weight_transport to object_store"
            ) from error


def cut(layout: Layout, dtype: torch.dtype, bucket_bytes: int | None = None) -> list[list[str]]:
    """Names of the weights that travel together: whole ones, in order, up to `bucket_bytes` or one that is larger."""
    limit = bucket_bytes or BUCKET_BYTES
    buckets: list[list[str]] = []
    room = 0
    for name, shape in layout:
        size = prod(shape) * dtype.itemsize
        if size > room or not buckets:
            buckets.append([])
            room = limit
        buckets[-1].append(name)
        room -= size
    return buckets
