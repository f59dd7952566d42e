"""Python's garbage collector, out of the way of imports."""

from __future__ import annotations

import gc
from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Generator[None]:
    """No garbage collection inside the `with`.

    Importing torch and transformers makes hundreds of thousands of objects, none of them garbage. The collector goes over
    them again and again, for a seventh of the time that imports take (rlhf_ray/bench/trials.py).
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
