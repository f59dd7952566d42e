"""The functions in C as they are compiled for processors that this one may not be, whose instructions are then emulated."""

import ctypes
import functools
import hashlib
import platform
from pathlib import Path

import pytest
import torch

from rlhf_ray.cpu import kernels
from rlhf_ray.training.precision import _cpu_flags

HEADER = Path(__file__).parent / "emulated" / "immintrin.h"
# In the name of the library, so that another header makes another one. Slow whatever the compiler does, so that need not take long.
EMULATION = ("-w", "-O1", f"-I{HEADER.parent}", f"-DHEADER_{hashlib.sha256(HEADER.read_bytes()).hexdigest()[:16]}")
AVX512 = (*EMULATION, "-U__AMX_BF16__", "-D__AVX512BW__", "-D__AVX512DQ__", "-D__AVX512VL__", "-D__AVX512BF16__")
PROCESSORS = {"this one": (), "AVX512-BF16": AVX512, "AMX": (*AVX512, "-D__AMX_BF16__")}
if platform.machine() in ("x86_64", "AMD64") and "avx512f" in _cpu_flags():
    PROCESSORS["no AVX512"] = ("-mno-avx512f", "-mno-amx-bf16")
# Whatever `kernels.probe` says of this one's.
HERE = ["this one"] if kernels.library() is not None and kernels.library().has_blocks() else []
WITH_BLOCKS = ["AVX512-BF16", "AMX", *HERE]


@functools.cache
def functions_of(processor: str) -> ctypes.CDLL | None:
    """None: there is no compiler."""
    if processor == "this one" or kernels.library() is None:
        return kernels.library()
    return ctypes.CDLL(str(kernels.compiled(PROCESSORS[processor])))


def _run_as(processor: str, monkeypatch) -> None:
    functions = functions_of(processor)
    if functions is None:
        pytest.skip("no C compiler")
    monkeypatch.setattr(kernels, "library", lambda: functions)
    monkeypatch.setattr(kernels, "has_blocks", lambda: bool(functions.has_blocks()))


@pytest.fixture(params=[1, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(params=PROCESSORS)
def processor(request, monkeypatch):
    """A test that asks for it runs with the functions of each."""
    _run_as(request.param, monkeypatch)


@pytest.fixture(params=WITH_BLOCKS)
def processor_with_blocks(request, monkeypatch):
    """... of each that has a unit for products of matrices."""
    _run_as(request.param, monkeypatch)
    assert kernels.has_blocks()
