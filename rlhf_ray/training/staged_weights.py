"""One version of the policy's weights in the host's memory, cut and cast for a `WeightChannel`, which sends it from there while the
policy trains on.

It is the same memory for every version, and pinned for a policy on a GPU. So one version is on its way at a time, and whoever
stages the next one waits for it. That costs nothing with `ppo.steps_ahead` up to 2: generators take a version when they have drawn
what the policy needs before it has the next one.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from math import prod

import torch

from rlhf_ray.errors import RunFailed
from rlhf_ray.models.host_memory import host_buffer
from rlhf_ray.training.weight_channel import Layout, cut


class StagedWeights:
    """One thread fills it, another sends it."""

    def __init__(self, layout: Layout, dtype: torch.dtype, *, pinned: bool):
        self.dtype, shapes = dtype, dict(layout)
        flat = host_buffer([sum(map(prod, shapes.values()))], dtype, pinned=pinned)
        names = cut(layout, dtype)
        sizes = [[prod(shapes[name]) for name in bucket] for bucket in names]
        self.buckets: Sequence[torch.Tensor] = flat.split([sum(each) for each in sizes])
        self.weights = {
            name: part.view(shapes[name])
            for bucket, flat, parts in zip(names, self.buckets, sizes, strict=True)
            for name, part in zip(bucket, flat.split(parts), strict=True)
        }
        self._free = threading.Event()
        self._free.set()

    @torch.no_grad()
    def fill(self, weights: Iterable[tuple[str, torch.Tensor]], timeout_s: float) -> int:
        """Copy (name, weight) pairs of the layout, each let go before the next; returns the bytes. A GPU casts before it sends.

        Waits until the version before is sent: RunFailed after timeout_s.
        """
        if not self._free.wait(timeout_s):
            raise RunFailed(
                f"the weights before these were not sent to the generators within {timeout_s:g} s; look in the run folder's logs/ "
                "of both, raise resources.call_timeout_s, or set resources.weight_transport to object_store"
            )
        missing = set(self.weights)
        for name, weight in weights:
            missing.remove(name)
            assert weight.shape == self.weights[name].shape, "not the weights of the layout"
            self.weights[name].copy_(weight.detach().to(self.dtype), non_blocking=True)
        assert not missing, "weights of the layout are missing"
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        self._free.clear()
        return sum(flat.nbytes for flat in self.buckets)

    @contextmanager
    def being_sent(self) -> Iterator[Sequence[torch.Tensor]]:
        """The buckets, in the order in which they are sent. Afterwards they are free."""
        try:
            yield self.buckets
        finally:
            self._free.set()
