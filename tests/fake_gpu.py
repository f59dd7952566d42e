"""A GPU that only knows shapes, dtypes and devices, on torch's build for CPUs: every operation that mixes devices raises.

Tensors on "cuda" are FakeTensors, without numbers. What the host reads of one is made up: zeros, and `NUMBER` where code asks for
one number. Autograd's backward pass needs a real device, so forward passes are what runs here.
"""

import ctypes
import functools
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode

NUMBER = 5
# Torch asks each kind of device for a guard before it works on one; the build for CPUs has none for CUDA. This one does nothing.
GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace c10::impl { C10_REGISTER_GUARD_IMPL(CUDA, NoOpDeviceGuardImpl<DeviceType::CUDA>) }
"""
ONE_NUMBER = {torch.Tensor.item: NUMBER, torch.Tensor.__int__: NUMBER, torch.Tensor.__index__: NUMBER,
              torch.Tensor.__float__: float(NUMBER), torch.Tensor.__bool__: True}  # fmt: skip


@functools.cache
def load_guard():
    """Once per process: torch keeps it."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if torch.cuda.is_available() or compiler is None:
        pytest.skip("there is a GPU" if torch.cuda.is_available() else "there is no C++ compiler")
    root = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "guard.cpp", Path(folder) / "guard.so"
        source.write_text(GUARD)
        places = [f"-I{root / 'include'}", f"-L{root / 'lib'}"]
        subprocess.run([compiler, "-std=c++20", "-shared", "-fPIC", *places, source, "-o", library, "-lc10"], check=True)
        return ctypes.CDLL(str(library))


class HostReads(TorchFunctionMode):
    """What needs numbers: made up for tensors without, and refused as a GPU's would be."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in ONE_NUMBER:
            return ONE_NUMBER[func]
        if func in (torch.Tensor.numpy, torch.Tensor.tolist):
            tensor = args[0]
            if func is torch.Tensor.numpy and tensor.device.type != "cpu":
                raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
            zeros = np.zeros(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            return zeros if func is torch.Tensor.numpy else zeros.tolist()
        return func(*args, **(kwargs or {}))


@contextmanager
def fake_gpu():
    """Inside, torch has a GPU that computes in bfloat16, and no other."""
    load_guard()
    with (
        mock.patch("torch.cuda.amp.common.amp_definitely_not_available", return_value=False),
        mock.patch("torch.cuda.is_bf16_supported", return_value=True),
        # Of tensors of one number it would keep the number, and compute with it on a real device.
        mock.patch("torch._subclasses.fake_tensor.CONSTANT_NUMEL_LIMIT", -1),
        FakeTensorMode(),
        HostReads(),
        torch.no_grad(),
    ):
        yield


def moved(module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A real module with its parameters and buffers on the GPU, in place. dtype: of parameters; None: their own."""
    there: dict[int, torch.Tensor] = {}
    for child in module.modules():
        for name, old in (*child._parameters.items(), *child._buffers.items()):
            if old is None or old.device.type == "cuda":
                continue
            if id(old) not in there:
                is_parameter = isinstance(old, nn.Parameter)
                new = torch.empty(old.shape, dtype=(dtype or old.dtype) if is_parameter else old.dtype, device="cuda")
                there[id(old)] = nn.Parameter(new, old.requires_grad) if is_parameter else new
            (child._parameters if name in child._parameters else child._buffers)[name] = there[id(old)]
    return module
