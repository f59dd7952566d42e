"""The functions in C as they are compiled for this processor, and for one without its widest vectors."""

import ctypes
import functools
import platform

import pytest
import torch

from rlhf_ray.cpu import compiled, packed_linear
from rlhf_ray.training.precision import _cpu_flags

PROCESSORS = {"this one": ()}
if platform.machine() in ("x86_64", "AMD64") and "avx512f" in _cpu_flags():
    PROCESSORS["no AVX512"] = ("-mno-avx512f", "-mno-amx-bf16")


@functools.cache
def functions_of(processor: str) -> ctypes.CDLL | None:
    """None: there is no compiler."""
    if processor == "this one" or compiled.library() is None:
        return compiled.library()
    return ctypes.CDLL(str(compiled.compiled(PROCESSORS[processor])))


@pytest.fixture(params=[1, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(params=PROCESSORS)
def processor(request, monkeypatch):
    """A test that asks for it runs with the functions of each."""
    functions = functions_of(request.param)
    if functions is None:
        pytest.skip("no C compiler")
    for module in (compiled, packed_linear):
        monkeypatch.setattr(module, "library", lambda: functions)
