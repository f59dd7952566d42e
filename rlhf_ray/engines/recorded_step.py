"""A decode step that is recorded when it comes again, and then made by one call.   n rows, R those that the cache has room for."""

from __future__ import annotations

import numpy as np
import torch
from transformers import PreTrainedModel

from rlhf_ray import kernels
from rlhf_ray.engines.decode_step import DecodeStep
from rlhf_ray.engines.kv_cache import RaggedCache
from rlhf_ray.kernels.recording import OtherWork, Program, Recording


class RecordedStep:
    """A model's decode step, to the bit, in a fraction of the time in which Python goes through it.

    The first step over a cache, and the first after weights have changed or the cache has moved, goes the plain way, which packs
    weights; the next one is recorded. A step with work that is not in C (`kernels.recording.NAMES`) never is.
    """

    def __init__(self, model: PreTrainedModel, step: DecodeStep):
        self.model, self.step = model, step
        places = [(module._parameters, name) for module in model.modules() for name in module._parameters]
        self._places = [(parameters, name) for parameters, name in places if parameters[name] is not None]
        versions_count = not any(parameters[name].is_inference() for parameters, name in self._places)
        self._recordable = versions_count and kernels.library() is not None
        self._seen: tuple | None = None  # the last step's state
        self._weights: list[torch.Tensor] = []  # of it: while they are here no other has their identity
        self._program: Program | None = None
        self._tokens = self._positions = torch.empty(0, dtype=torch.int64)

    def __call__(self, cache: RaggedCache, tokens: np.ndarray, positions: np.ndarray) -> torch.Tensor:
        """Feed tokens [n] at positions [n]; -> logits [n, V], which the next call may write over."""
        state = self._state(cache) if self._recordable else None
        if state is None or state != self._seen:
            self._seen, self._program = state, None
            return self._plain(cache, tokens, positions)
        if self._program is None and not self._record(cache):
            return self._plain(cache, tokens, positions)
        n = len(tokens)
        self._tokens[:n], self._positions[:n] = torch.from_numpy(tokens), torch.from_numpy(positions)
        self._program.run(n)
        return self._program.result[:n]

    def _plain(self, cache: RaggedCache, tokens: np.ndarray, positions: np.ndarray) -> torch.Tensor:
        inputs = torch.from_numpy(np.stack([tokens, positions]))
        cache.begin_decode(inputs[1], cache.write.slots)
        return self.step(self.model, cache, inputs[0], inputs[1])

    def _record(self, cache: RaggedCache) -> bool:
        rows = cache.write.rows
        self._tokens, self._positions = torch.zeros(2, rows, dtype=torch.int64)
        cache.begin_decode(self._positions, cache.write.slots)
        try:
            with Recording() as recording:
                logits = self.step(self.model, cache, self._tokens, self._positions)
        except OtherWork:
            self._recordable = False
            return False
        self._program = Program(recording, logits)
        return True

    def _state(self, cache: RaggedCache) -> tuple | None:
        """What a recording depends on; None: what is done depends on more."""
        if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return None
        self._weights = weights = [parameters[name] for parameters, name in self._places]
        return (
            [(id(each), each.data_ptr(), each._version) for each in weights],
            [each.data_ptr() for layer in cache.layers if layer.is_initialized
             for each in (layer.keys, layer.values, layer.centres)],
            cache.write.rows,
        )  # fmt: skip
