"""What every actor process does first."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch


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
    return torch.device("cuda" if gpus > 0 else "cpu")
