"""Whether products in blocks do what they are for on this machine: asked once, and kept beside the compiled functions.

Processors have the same instructions and differ in all that makes them fast, and how fast the library's products are depends on
its version too. So blocks are first held against those, in both respects. What was found stays, since bits depend on it.
"""

from __future__ import annotations

import fcntl
import functools
import json
import logging
import os
import statistics
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import torch

from rlhf_ray.cpu import kernels

LINES, INPUTS, OUTPUTS = 512, 512, 1024
REPEATS = 9
ROUNDING = 2**-7  # of a bfloat16, and as much again for sums in another order
WAIT_S = 30.0
LEAST = 0.95  # times as fast as torch's: a little slower they would still spare activations' passes

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Finding:
    """error: the largest, as a share of the largest number there should be. times_as_fast: as torch's products."""

    error: float
    times_as_fast: float

    @property
    def good(self) -> bool:
        return self.error < ROUNDING and self.times_as_fast >= LEAST


@functools.cache
def finding(path: Path) -> Finding:
    """Of the library at that path, whose functions `kernels.kernel` gives. One process finds it out, others wait for that."""
    record = path.with_suffix(f".torch-{torch.__version__}.json")
    known = _read(record)
    if known is not None:
        return known
    with ExitStack() as stack:
        try:
            lock = stack.enter_context(open(path.with_suffix(".lock"), "w"))
            _take(lock)
        except OSError:  # a folder that others have filled, say, or a file system without locks
            pass
        found = _read(record) or probe()
        part = record.with_suffix(f".{os.getpid()}.part")
        try:
            part.write_text(json.dumps(asdict(found)))
            os.replace(part, record)
        except OSError as error:
            log.warning("what blocks do on this machine can't be kept, and is found out in every process: %s", error)
    if not found.good:
        words = (
            "bfloat16 products in C have an error of %.2g and are %.2f times as fast as torch's here: torch's are used"
        )
        log.warning(words, found.error, found.times_as_fast)
    return found


def _read(record: Path) -> Finding | None:
    try:
        return Finding(**json.loads(record.read_text()))
    except (OSError, ValueError, TypeError):  # it is not there, or only a part of it
        return None


def _take(lock: IO) -> None:
    """Hold it from here on until it is closed; after WAIT_S go on without."""
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.01)


def probe() -> Finding:
    """A layer's output and both of its gradients, by one thread: in turns with torch's, and beside them in float32."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            return _probe()
    finally:
        torch.set_num_threads(threads)


def _probe() -> Finding:
    generator = torch.Generator().manual_seed(0)
    x, weight, gradient = (
        torch.randn(shape, generator=generator).bfloat16()
        for shape in ((LINES, INPUTS), (OUTPUTS, INPUTS), (LINES, OUTPUTS))
    )
    tiles = torch.empty(OUTPUTS // 16, INPUTS // 32, 16, 16, 2, dtype=torch.bfloat16)
    output, by_x = (torch.empty(shape, dtype=torch.bfloat16) for shape in ((LINES, OUTPUTS), (LINES, INPUTS)))
    by_weight = torch.empty(OUTPUTS, INPUTS)
    forward, by_input, of_weight = map(kernels.kernel, ("linear", "linear_by_input", "linear_by_weight"))

    def blocks() -> None:
        forward(x, tiles, None, None, output, None, LINES, INPUTS, OUTPUTS, 0)
        by_input(gradient, tiles, None, by_x, LINES, INPUTS, OUTPUTS)
        of_weight(gradient, x, by_weight, LINES, OUTPUTS, INPUTS, 0)

    def torchs() -> None:
        torch.nn.functional.linear(x, weight)
        torch.mm(gradient, weight)
        torch.mm(gradient.t(), x)

    kernels.kernel("linear_tiles")(None, weight, tiles, INPUTS, OUTPUTS, weight.stride(1), weight.stride(0))
    seconds: dict = {blocks: [], torchs: []}
    for number in range(REPEATS + 1):
        for run, taken in seconds.items():
            started = time.perf_counter()
            run()
            if number > 0:
                taken.append(time.perf_counter() - started)
    wide = [each.float() for each in (x, weight, gradient)]
    expected = wide[0] @ wide[1].T, wide[2] @ wide[1], wide[2].T @ wide[0]
    errors = [
        float((found.float() - right).abs().max() / right.abs().max())
        for found, right in zip((output, by_x, by_weight), expected, strict=True)
    ]
    # A NaN is no error that is small enough, and max may pass over it.
    error = max(errors) if all(each == each for each in errors) else float("inf")
    return Finding(error, statistics.median(seconds[torchs]) / statistics.median(seconds[blocks]))
