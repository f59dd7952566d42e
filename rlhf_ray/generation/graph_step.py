"""The decode step as a CUDA graph: one launch per token where there are a thousand.   n rows, R padded rows, C slots, V vocabulary.

Nobody has run this on a GPU yet. It is the engine "graphs" of `tables.engines`, which no recipe names; results/gpu/first_hour.sh
measures it. Off CUDA the same code runs step by step: shapes, padding and what is captured anew are tested there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from rlhf_ray.generation.decode_step import DecodeStep, Operations
from rlhf_ray.generation.kv_cache import RaggedCache, RaggedLayer

ROW_MULTIPLE = 8  # rows are padded to it: a graph for each number of rows would be captured anew whenever a row ends


def graphs_problem(gpus: float) -> str | None:
    """As the table of engines asks."""
    if gpus > 0:
        return None
    return "generation.engine is graphs, which are CUDA's, and generation has no GPU; set it to torch, or resources.generation.gpus"


class GraphStep:
    """A decode step that is captured once and replayed while the cache's memory stays where it is.

    It does what `DecodeStep` does, on padded rows: those beyond n feed token 0 to slot 0 of rows that nobody uses.
    """

    def __init__(self, step: DecodeStep):
        self.step = step
        step.operations = FixedShapes()
        self._where: tuple[int, int] | None = None  # of the cache that graphs were captured over: slots, and where the keys begin
        self._captured: dict[int, tuple[torch.Tensor, Callable[[], torch.Tensor]]] = {}  # R -> inputs [2, R], what replays

    def __call__(self, cache: RaggedCache, tokens: np.ndarray, positions: np.ndarray) -> torch.Tensor:
        n, slots = len(tokens), cache.write.slots
        rows = min(-(-n // ROW_MULTIPLE) * ROW_MULTIPLE, cache.write.rows)
        where = slots, _begin_of(cache)
        if where != self._where:
            self.forget()
        fed = np.zeros((2, rows), np.int64)
        fed[:, :n] = tokens, positions
        if rows not in self._captured:
            inputs = torch.from_numpy(fed).to(self.step.model.device)

            def run() -> torch.Tensor:
                cache.begin_decode(inputs[1], slots)
                return self.step.written_out(self.step.model, cache, inputs[0], inputs[1], self.step.operations)

            self._captured[rows] = inputs, captured(run, inputs.device)
            self._where = slots, _begin_of(cache)
        inputs, replay = self._captured[rows]
        inputs.copy_(torch.from_numpy(fed))
        return replay()[:n]

    def forget(self) -> None:
        self._captured.clear()
        self._where = None


def captured(run: Callable[[], torch.Tensor], device: torch.device) -> Callable[[], torch.Tensor]:
    """What repeats `run` on the memory that it reads now; its result stands where it stood before."""
    if device.type != "cuda":
        return run
    beside = torch.cuda.Stream(device)
    beside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(beside):  # libraries set themselves up in a first run, which no graph may hold
        run()
    torch.cuda.current_stream(device).wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()

    def replay() -> torch.Tensor:
        graph.replay()
        return output

    return replay


def _begin_of(cache: RaggedCache) -> int:
    """Where the keys of the first layer lie; 0 before there are any."""
    layer = cast(RaggedLayer, cache.layers[0])
    return 0 if layer.keys is None else layer.keys.data_ptr()


class FixedShapes(Operations):
    """Attention over all slots of the cache, by one fused operation; nothing depends on a number that is on the device."""

    def attention(self, cache, dtype, groups, channels):
        targets, length = cache.write.targets, cache.write.length
        assert targets is not None
        mask = (torch.arange(length, device=targets.device) <= targets[:, None])[:, None, None]  # [R, 1, 1, C]

        def attend(layer, query, key, value, scaling):
            keys, values = layer.update(key[:, :, None], value[:, :, None])
            query = query.reshape(len(query), groups, -1, channels)
            return scaled_dot_product_attention(query, keys, values, mask, scale=scaling).reshape(len(query), -1)

        return attend
