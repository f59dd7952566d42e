"""Calls of functions in C that are recorded once and then made, again and again, by one call (calls.c).

A decode step is dozens of such calls, each so short that for few rows Python takes as long to ask for it; and Python's lock, which
a server's other threads want too, is asked for once and not dozens of times.
"""

from __future__ import annotations

import ctypes
import struct
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlhf_ray.cpu.compiled import call, of_thread

NAMES = ("add_and_normalise", "embed", "turn", "decode_attention_float32", "linear")  # numbered as in calls.c
ALLOCATE = ("empty", "empty_like", "new_empty")  # torch's


class OtherWork(Exception):
    """The step has work that is not in C functions."""


class Recording(TorchDispatchMode):
    """In the body of a `with`, on this thread: functions of NAMES are recorded and not called, new tensors stay empty, and whatever
    else would compute or copy raises OtherWork.
    """

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[int, tuple]] = []  # functions by their numbers, arguments
        self.new: dict[int, torch.UntypedStorage] = {}  # of tensors that were made, by where they begin

    def __enter__(self):
        of_thread.recording = self
        return super().__enter__()

    def __exit__(self, *exception):
        of_thread.recording = None
        return super().__exit__(*exception)

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function.overloadpacket.__name__
        if name not in ALLOCATE and not function.is_view:
            raise OtherWork(name)
        result = function(*arguments, **(keywords or {}))
        if name in ALLOCATE:
            self.new[_begin(result)] = result.untyped_storage()
        elif not _begins(result) <= _begins((arguments, keywords)):  # what torch calls a view may be a copy
            raise OtherWork(name)
        return result

    def take(self, name: str, arguments: tuple) -> None:
        if name not in NAMES:
            raise OtherWork(name)
        self.calls.append((NAMES.index(name), arguments))


def _begin(tensor: torch.Tensor) -> int:
    """Where its storage is."""
    return tensor.untyped_storage().data_ptr()


def _begins(tree) -> set[int]:
    return {_begin(each) for each in tree_leaves(tree) if isinstance(each, torch.Tensor)}


class _Call(ctypes.Structure):
    _fields_ = [("function", ctypes.c_int64), ("words", ctypes.c_int64 * 16)]


class Program:
    """What was recorded, to be made for the first n of the recorded rows.

    Tensors from before the recording are used where they stand; nobody may move them. Those made in it have places here, one place
    for several that are not in use at the same time.
    """

    def __init__(self, recording: Recording, result: torch.Tensor, theirs: Sequence[torch.Tensor] = ()):
        """result: of the last call. theirs: tensors that need not be there for longer than the caller wants to run this."""
        tensors = [
            [(each, _begin(each)) for each in arguments if isinstance(each, torch.Tensor)]
            for _, arguments in recording.calls
        ]
        elsewhere = recording.new.keys() | {_begin(each) for each in theirs}
        self._kept = [each for pairs in tensors for each, begin in pairs if begin not in elsewhere]
        places = _places([[begin for _, begin in pairs if begin in recording.new] for pairs in tensors], recording.new)
        moved = {begin: place.data_ptr() - begin for begin, place in places.items()}
        self._calls = (_Call * len(recording.calls))()
        for made, (number, arguments), pairs in zip(self._calls, recording.calls, tensors, strict=True):
            addresses = iter([each.data_ptr() + moved.get(begin, 0) for each, begin in pairs])
            words = (next(addresses) if isinstance(each, torch.Tensor) else _word(each) for each in arguments)
            made.function, made.words[: len(arguments)] = number, list(words)
        self._places = places
        self.result = places[_begin(result)].view(result.dtype).view(result.shape)  # of each run

    def run(self, n: int) -> None:
        call("make_calls", ctypes.addressof(self._calls), len(self._calls), n)


def _places(used: list[list[int]], storages: dict[int, torch.UntypedStorage]) -> dict[int, torch.Tensor]:
    """used: which storages each call uses -> where each is to be."""
    last = {each: number for number, call in enumerate(used) for each in call}
    places: dict[int, torch.Tensor] = {}
    free: dict[int, list[torch.Tensor]] = defaultdict(list)  # by size in bytes
    for number, needed in enumerate(used):
        for each in needed:
            if each not in places:
                size = storages[each].nbytes()
                places[each] = free[size].pop() if free[size] else torch.empty(size, dtype=torch.uint8)
        for each in {each for each in needed if last[each] == number}:
            free[places[each].numel()].append(places[each])
    return places


def _word(argument: float | None) -> int:
    """A number by its bits."""
    if isinstance(argument, float):
        return struct.unpack("<I", struct.pack("<f", argument))[0]
    return argument or 0
