"""A decode step that is recorded when it comes again, and then made by one call.   n rows, R those that the cache has room for."""

from __future__ import annotations

# Layers of transformers are changed in place, which their annotations do not know.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportOptionalSubscript=false, reportOptionalMemberAccess=false, reportReturnType=false
import numpy as np
import torch

from rlhf_ray.cpu.protocols import Cache, Step
from rlhf_ray.cpu.recording import OtherWork, Program, Recording


class RecordedStep:
    """A model's decode step, equal to the bit, in a fraction of the time that Python takes for it.

    The first step over a cache, and the first after weights have changed or the cache has moved, goes the plain way, which packs
    weights; the next one is recorded. A step with work that is not in C (`recording.NAMES`) never is. Weights may change
    while a batch runs, into other tensors too; modules may not.
    """

    def __init__(self, step: Step):
        self.step = step
        places = [(module._parameters, name) for module in step.model.modules() for name in module._parameters]
        self._places = [(parameters, name) for parameters, name in places if parameters[name] is not None]
        self._seen: tuple | None = None  # the last step's state
        self._refused: tuple | None = None  # that of a step with other work
        self._weights: list[torch.Tensor] = []  # the recording's: while they are kept here, no others get their ids
        self._program: Program | None = None
        self._inputs = np.zeros((2, 0), np.int64)  # tokens and positions, where the program reads them

    def __call__(self, cache: Cache, tokens: np.ndarray, positions: np.ndarray) -> torch.Tensor:
        """Feed tokens [n] at positions [n]; -> logits [n, V], which the next call may write over."""
        state = self._state(cache)
        if state is None or state != self._seen:
            self._seen, self._program = state, None
            return self.step(cache, tokens, positions)
        if self._program is None and not self._record(cache):
            return self.step(cache, tokens, positions)
        n = len(tokens)
        self._inputs[0, :n], self._inputs[1, :n] = tokens, positions
        self._program.run(n)
        return self._program.result[:n]

    @property
    def is_recorded(self) -> bool:
        return self._program is not None

    def forget(self) -> None:
        """Give back what a recording holds."""
        self._seen = self._refused = self._program = None
        self._weights = []

    def _record(self, cache: Cache) -> bool:
        if self._seen == self._refused:
            return False
        self._inputs = np.zeros((2, cache.write.rows), np.int64)
        tokens, positions = torch.from_numpy(self._inputs)
        cache.begin_decode(positions, cache.write.slots)
        try:
            with Recording() as recording:
                logits = self.step.written_out(self.step.model, cache, tokens, positions, self.step.operations)
        except OtherWork:
            self._refused = self._seen
            return False
        self._program = Program(recording, logits, theirs=_tensors(cache))
        return True

    def _state(self, cache: Cache) -> tuple | None:
        """What a recording depends on; None: what is done depends on more, or has to be done once."""
        computes = torch.is_grad_enabled() or torch.is_autocast_enabled("cpu")
        if computes or not all(layer.is_initialized for layer in cache.layers):
            return None
        self._weights = weights = [parameters[name] for parameters, name in self._places]
        if any(each.is_inference() for each in weights):  # they have no versions
            return None
        return (
            [(id(each), each.data_ptr(), each._version) for each in weights],
            [each.data_ptr() for each in _tensors(cache)],
            cache.write.rows,
            cache.write.slots,
        )


def _tensors(cache: Cache) -> list[torch.Tensor]:
    return [each for layer in cache.layers for each in (layer.keys, layer.values, layer.centres)]
