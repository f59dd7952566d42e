"""What every actor process does first."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
MMAP, TRIM = 32 << 20, 128 << 20


def set_up_process(name: str, logs: Path, *, threads: int | None, gpus: float) -> torch.device:
    """Send what the process prints to logs/<name>.log, fix its threads, choose its device."""
    logs.mkdir(parents=True, exist_ok=True)
    log = os.open(logs / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    if threads is not None:
        torch.set_num_threads(threads)
    keep_freed_memory()
    return torch.device("cuda" if gpus > 0 else "cpu")


def keep_freed_memory() -> None:
    """Let glibc hand the next microbatch the memory of the last one. By default numbers of a megabyte or more come from the
    kernel, page by page, and go back to it when freed: a tenth of a small model's forward pass is that.

    A process keeps at most TRIM bytes that it does not use. Other C libraries have no such knobs, or ignore them.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, MMAP)
        mallopt(M_TRIM_THRESHOLD, TRIM)
