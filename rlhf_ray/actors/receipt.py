"""The seconds and bytes of a call, beside its result."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class CallReceipt:
    seconds: float  # of computing, without waiting for arguments
    bytes: int  # of what it returned


def nbytes(value: Any) -> int:
    """Bytes of the arrays in a result."""
    if isinstance(value, np.ndarray):
        return value.nbytes
    if is_dataclass(value):
        # getattr: a slotted dataclass has no __dict__, and asdict would copy the arrays.
        return sum(nbytes(getattr(value, part.name)) for part in fields(value))
    if isinstance(value, dict):
        return sum(map(nbytes, value.values()))
    return sum(map(nbytes, value)) if isinstance(value, (list, tuple)) else 0


def with_receipt(method: Callable) -> Callable:
    """Return (result, CallReceipt), or (*results, CallReceipt) of a method that returns a list."""

    @wraps(method)
    def wrapped(self, *args):
        started = time.perf_counter()
        result = method(self, *args)
        receipt = CallReceipt(time.perf_counter() - started, nbytes(result))
        return (*result, receipt) if isinstance(result, list) else (result, receipt)

    return wrapped
